//! Stripe: a `PaymentIntent` is created, its id stored, and only then confirmed. Everything after that goes by the intent's own state, which is asked for
//! before each step: Stripe forgets idempotency keys after 24 hours and answers a repeated key with the stored error, a 500 too
//! (<https://docs.stripe.com/api/idempotent_requests>).
//!
//! No card data comes here: `payment_method` is Stripe's token, made in the customer's browser.

mod http;
pub mod webhook;

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use consign::config::redacted;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::{Answer, Charge, GatewayError, PaymentGateway, Refund, Refunded};
use http::{Api, ApiError};

/// The version of Stripe's API that this is written for (<https://docs.stripe.com/api/versioning>).
pub const API_VERSION: &str = "2024-06-20";

/// The section `[payment.gateway.stripe]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StripeConfig {
    /// Where the API is. Plain HTTP only on loopback.
    pub base_url: String,
    /// The secret key, `sk_…` or `rk_…`.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "redacted")]
    pub api_key: Option<SecretString>,
    /// The signing secret of the webhook endpoint, `whsec_…`. Without it webhooks are refused.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "redacted")]
    pub webhook_secret: Option<SecretString>,
    /// A webhook signed longer ago is refused: it may be a replay.
    #[serde(with = "humantime_serde")]
    pub webhook_tolerance: Duration,
    /// When the money is taken: with the confirmation, or in a step of its own after it.
    pub capture: Capture,
    /// Which kinds of payment methods are accepted.
    pub payment_method_types: Vec<String>,
    /// Authorities trusted instead of the system's, in PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
}

/// When the money is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Capture {
    /// With the confirmation.
    #[default]
    Automatic,
    /// Authorised first, captured in a second step: what is cancelled in between costs no refund.
    Manual,
}

impl Default for StripeConfig {
    fn default() -> Self {
        Self {
            base_url: "https://api.stripe.com".into(),
            api_key: None,
            webhook_secret: None,
            webhook_tolerance: Duration::from_secs(300),
            capture: Capture::Automatic,
            payment_method_types: vec!["card".into()],
            ca_file: None,
        }
    }
}

impl StripeConfig {
    /// What is wrong with it.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.api_key.is_none() {
            faults.push("api_key must be set (CONSIGN_SERVICE__GATEWAY__STRIPE__API_KEY, or _PAYMENT_ for `consign up`)".to_owned());
        }
        if let Err(fault) = http::endpoint(&self.base_url) {
            faults.push(format!("base_url = {:?}: {fault}", self.base_url));
        }
        if self.payment_method_types.is_empty() {
            faults.push("payment_method_types must name at least one, for example \"card\"".to_owned());
        }
        if self.webhook_tolerance < Duration::from_secs(1) {
            faults.push("webhook_tolerance must be at least 1s".to_owned());
        }
        faults
    }
}

/// The gateway cannot be used as it is configured.
#[derive(Debug, Error)]
pub enum StripeError {
    /// Something is missing or malformed.
    #[error("payment.gateway.stripe: {0}")]
    Config(String),
    /// The authorities cannot be read.
    #[error("payment.gateway.stripe.ca_file: {0}")]
    Authorities(String),
}

/// Stripe, or what speaks like it.
pub struct StripeGateway {
    api: Api,
    capture: Capture,
    payment_method_types: Vec<String>,
}

impl StripeGateway {
    /// Ready to call; nothing is called yet.
    pub fn new(config: &StripeConfig) -> Result<Self, StripeError> {
        Ok(Self {
            api: Api::new(config)?,
            capture: config.capture,
            payment_method_types: config.payment_method_types.clone(),
        })
    }

    async fn create(&self, charge: &Charge) -> Result<Answer, GatewayError> {
        let Some(method) = &charge.method else {
            return Ok(Answer::Declined("no_payment_method".into()));
        };
        let (amount, currency) = (charge.amount.to_string(), charge.currency.to_lowercase());
        let (order_id, payment_id) = (charge.order_id.to_string(), charge.payment_id.to_string());
        let mut form = vec![
            ("amount", amount.as_str()),
            ("currency", &currency),
            ("payment_method", method),
            ("metadata[order_id]", &order_id),
            ("metadata[payment_id]", &payment_id),
        ];
        form.extend(self.payment_method_types.iter().map(|t| ("payment_method_types[]", t.as_str())));
        if self.capture == Capture::Manual {
            form.push(("capture_method", "manual"));
        }
        // With the attempt in the key: a stored error must not be the answer for a day. Of two intents only the one that is stored is ever
        // confirmed; the other charges nothing.
        let key = format!("{payment_id}-create-{}", charge.attempt);
        match self.api.post("/v1/payment_intents", &form, &key).await {
            Ok(intent) => Ok(Answer::Prepared(Intent::read(&intent)?.id)),
            Err(ApiError::Card(why)) => Ok(Answer::Declined(why)),
            Err(e) => Err(e.into()),
        }
    }

    async fn intent(&self, reference: &str) -> Result<Intent, GatewayError> {
        Intent::read(&self.api.get(&format!("/v1/payment_intents/{reference}"), &[]).await?)
    }

    /// One step of an intent's life.
    async fn step(&self, reference: &str, step: &str, charge: &Charge) -> Result<Intent, ApiError> {
        // The intent's state lets each step take effect once, whatever the key; the attempt is in it so that a stored error is not the answer for a day.
        let key = format!("{}-{step}-{}", charge.payment_id, charge.attempt);
        let intent = self.api.post(&format!("/v1/payment_intents/{reference}/{step}"), &[], &key).await?;
        Intent::read(&intent).map_err(|e| ApiError::Outage(e.to_string().into()))
    }

    /// Nobody will pay it any more, so that it cannot be paid behind our back.
    async fn give_up(&self, reference: &str, charge: &Charge, why: String) -> Result<Answer, GatewayError> {
        Ok(match self.cancel_intent(reference, charge).await? {
            Answer::Declined(_) => Answer::Declined(why),
            other => other,
        })
    }

    async fn cancel_intent(&self, reference: &str, charge: &Charge) -> Result<Answer, GatewayError> {
        let intent = match self.step(reference, "cancel", charge).await {
            // It is past being cancelled, or was cancelled before.
            Err(ApiError::Invalid(_)) => self.intent(reference).await?,
            other => other?,
        };
        match intent.status.as_str() {
            "canceled" => Ok(Answer::Declined("cancelled".into())),
            "succeeded" => Ok(Answer::Charged),
            "processing" => Ok(Answer::Processing),
            other => Err(GatewayError::unavailable(format!("cancelled, it is still {other}"))),
        }
    }
}

#[async_trait]
impl PaymentGateway for StripeGateway {
    async fn charge(&self, charge: &Charge) -> Result<Answer, GatewayError> {
        let Some(reference) = charge.reference.as_deref() else {
            return self.create(charge).await;
        };
        let mut intent = self.intent(reference).await?;
        if intent.amount != charge.amount || !intent.currency.eq_ignore_ascii_case(&charge.currency) {
            return Err(GatewayError::Refused(format!(
                "{reference} is of {} {}, not of {} {}",
                intent.amount, intent.currency, charge.amount, charge.currency
            )));
        }
        // Confirmed, captured: two steps at most, and then it is where it stays for now.
        for _ in 0..3 {
            let step = match intent.status.as_str() {
                "succeeded" => return Ok(Answer::Charged),
                "canceled" => return Ok(Answer::Declined("cancelled".into())),
                "processing" => return Ok(Answer::Processing),
                "requires_payment_method" => {
                    let why = intent.error.unwrap_or_else(|| "no_payment_method".into());
                    return self.give_up(reference, charge, why).await;
                }
                // Nobody is there who could.
                "requires_action" => {
                    return self.give_up(reference, charge, "authentication_required".into()).await;
                }
                "requires_confirmation" => "confirm",
                "requires_capture" => "capture",
                other => {
                    return Err(GatewayError::unavailable(format!(
                        "{reference} is {other}, whatever that is"
                    )));
                }
            };
            intent = match self.step(reference, step, charge).await {
                Ok(intent) => intent,
                Err(ApiError::Card(why)) => return self.give_up(reference, charge, why).await,
                Err(e) => return Err(e.into()),
            };
        }
        Err(GatewayError::unavailable(format!("{reference} does not get beyond {}", intent.status)))
    }

    async fn lookup(&self, charge: &Charge) -> Result<Option<Answer>, GatewayError> {
        let Some(reference) = charge.reference.as_deref() else { return Ok(None) };
        let intent = self.intent(reference).await?;
        Ok(match intent.status.as_str() {
            "succeeded" => Some(Answer::Charged),
            "canceled" => Some(Answer::Declined("cancelled".into())),
            "processing" => Some(Answer::Processing),
            _ => intent.error.map(Answer::Declined),
        })
    }

    async fn cancel(&self, charge: &Charge) -> Result<Answer, GatewayError> {
        match charge.reference.as_deref() {
            // An intent that was made but never stored is never confirmed.
            None => Ok(Answer::Declined("cancelled".into())),
            Some(reference) => self.cancel_intent(reference, charge).await,
        }
    }

    async fn refund(&self, refund: &Refund) -> Result<Refunded, GatewayError> {
        let reference = refund.charge.reference.as_deref();
        let reference = reference.ok_or_else(|| GatewayError::Refused("it was never prepared".into()))?;
        let (id, amount) = (refund.refund_id.to_string(), refund.amount.to_string());
        let made = self.api.get("/v1/refunds", &[("payment_intent", reference), ("limit", "100")]).await?;
        let ours = |r: &&Value| r["metadata"]["refund_id"] == id.as_str();
        let known = made["data"].as_array().into_iter().flatten().find(ours);
        let refund = if let Some(known) = known {
            known.clone()
        } else {
            let form =
                [("payment_intent", reference), ("amount", &amount), ("metadata[refund_id]", id.as_str())];
            match self.api.post("/v1/refunds", &form, &format!("refund-{id}")).await {
                Err(ApiError::Card(why)) => return Err(GatewayError::Refused(why)),
                other => other?,
            }
        };
        match refund["status"].as_str() {
            Some("succeeded") => Ok(Refunded::Done),
            Some("pending" | "requires_action") => Ok(Refunded::Processing),
            other => Err(GatewayError::Refused(format!(
                "the refund is {}: {}",
                other.unwrap_or("without a status"),
                refund["failure_reason"].as_str().unwrap_or("no reason given")
            ))),
        }
    }
}

/// What of a `PaymentIntent` matters here.
struct Intent {
    id: String,
    status: String,
    amount: i64,
    currency: String,
    error: Option<String>,
}

impl Intent {
    fn read(value: &Value) -> Result<Self, GatewayError> {
        let text = |name: &str| {
            let found = value[name].as_str().map(str::to_owned);
            found.ok_or_else(|| GatewayError::unavailable(format!("an answer without {name}")))
        };
        let error = &value["last_payment_error"];
        let error = error["decline_code"].as_str().or(error["code"].as_str()).map(str::to_owned);
        Ok(Self {
            id: text("id")?,
            status: text("status")?,
            amount: value["amount"].as_i64().unwrap_or_default(),
            currency: text("currency")?,
            error,
        })
    }
}
