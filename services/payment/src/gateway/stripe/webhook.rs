//! Stripe's webhooks: whether one is really Stripe's, and what it is about (<https://docs.stripe.com/webhooks#verify-manually>).
//!
//! What it says is taken as a hint to ask now, never as the state itself: webhooks come late, twice and out of order.

use std::time::Duration;

use consign::Timestamp;
use hmac::{Hmac, KeyInit, Mac};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use sha2::Sha256;
use thiserror::Error;

/// A webhook that is Stripe's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Webhook {
    /// The event's id: the same when it comes again.
    pub id: String,
    /// For example `payment_intent.succeeded`.
    pub kind: String,
    /// The payment intent it is about, if it is about one.
    pub intent: Option<String>,
}

/// It is not, or cannot be read.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum WebhookError {
    /// No `Stripe-Signature: t=…,v1=…`.
    #[error("the Stripe-Signature header is missing or malformed")]
    NoSignature,
    /// Signed by somebody else, or changed on the way.
    #[error("the signature does not fit; is payment.gateway.stripe.webhook_secret that of this endpoint?")]
    WrongSignature,
    /// Signed too long ago, or in the future.
    #[error("signed {0:?} away from now: a replay, or a clock that is wrong")]
    OutsideTolerance(Duration),
    /// The body is no event.
    #[error("the body is no event of Stripe's")]
    Unreadable,
}

/// Checks the signature and its age, then reads the body.
pub fn verify(
    header: Option<&str>,
    body: &[u8],
    secret: &SecretString,
    tolerance: Duration,
    now: Timestamp,
) -> Result<Webhook, WebhookError> {
    let (mut signed_at, mut signatures) = (None, Vec::new());
    for part in header.unwrap_or_default().split(',') {
        match part.trim().split_once('=') {
            Some(("t", t)) => signed_at = t.parse::<i64>().ok().map(|seconds| (t, seconds)),
            Some(("v1", signature)) => signatures.extend(unhex(signature)),
            // Schemes to come, and v0, which is for tests.
            _ => {}
        }
    }
    let Some((signed_text, seconds)) = signed_at.filter(|_| !signatures.is_empty()) else {
        return Err(WebhookError::NoSignature);
    };
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.expose_secret().as_bytes())
        .map_err(|_| WebhookError::WrongSignature)?;
    mac.update(signed_text.as_bytes());
    mac.update(b".");
    mac.update(body);
    // In constant time. While a secret is rolled there are two signatures.
    if !signatures.iter().any(|s| mac.clone().verify_slice(s).is_ok()) {
        return Err(WebhookError::WrongSignature);
    }
    let away = now.as_millis().abs_diff(seconds.saturating_mul(1000));
    if Duration::from_millis(away) > tolerance {
        return Err(WebhookError::OutsideTolerance(Duration::from_millis(away)));
    }
    read(body).ok_or(WebhookError::Unreadable)
}

fn read(body: &[u8]) -> Option<Webhook> {
    let event: Value = serde_json::from_slice(body).ok()?;
    let object = &event["data"]["object"];
    let intent = match object["object"].as_str() {
        Some("payment_intent") => object["id"].as_str(),
        // Charges, refunds and disputes name theirs.
        _ => object["payment_intent"].as_str(),
    };
    let id = event["id"].as_str().filter(|id| (1..=255).contains(&id.len()))?;
    Some(Webhook {
        id: id.to_owned(),
        kind: event["type"].as_str()?.to_owned(),
        intent: intent.map(str::to_owned),
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &[u8] = br#"{"id":"evt_1","type":"payment_intent.succeeded","data":{"object":{"object":"payment_intent","id":"pi_1"}}}"#;
    const NOW: Timestamp = Timestamp::from_millis(1_767_225_600_000);
    const TOLERANCE: Duration = Duration::from_secs(300);

    fn secret() -> SecretString {
        "whsec_test".to_owned().into()
    }

    fn sign(body: &[u8], at: i64, secret: &str) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
        mac.update(format!("{at}.").as_bytes());
        mac.update(body);
        let mut header = format!("t={at},v1=");
        for byte in mac.finalize().into_bytes() {
            header.push_str(&format!("{byte:02x}"));
        }
        header
    }

    fn check(header: &str, body: &[u8]) -> Result<Webhook, WebhookError> {
        verify(Some(header), body, &secret(), TOLERANCE, NOW)
    }

    #[test]
    fn what_stripe_signed_is_taken() {
        let at = NOW.as_millis() / 1000;
        let webhook = check(&sign(BODY, at, "whsec_test"), BODY).unwrap();
        assert_eq!((webhook.id.as_str(), webhook.intent.as_deref()), ("evt_1", Some("pi_1")));
        let rolled =
            format!("{},{}", sign(BODY, at, "old"), sign(BODY, at, "whsec_test").split_once(',').unwrap().1);
        assert!(check(&rolled, BODY).is_ok(), "while a secret is rolled");
    }

    #[test]
    fn what_it_did_not_is_refused() {
        let at = NOW.as_millis() / 1000;
        let good = sign(BODY, at, "whsec_test");
        assert_eq!(check(&good, b"{}"), Err(WebhookError::WrongSignature), "changed on the way");
        assert_eq!(check(&sign(BODY, at, "other"), BODY), Err(WebhookError::WrongSignature));
        assert_eq!(verify(None, BODY, &secret(), TOLERANCE, NOW), Err(WebhookError::NoSignature));
        for header in ["", "t=1", "v1=00", "t=x,v1=00", "t=1,v1=zz", "t=1,v1=0"] {
            assert_eq!(check(header, BODY), Err(WebhookError::NoSignature), "{header}");
        }
        for away in [-301, 301] {
            let replay = check(&sign(BODY, at + away, "whsec_test"), BODY);
            assert_eq!(replay, Err(WebhookError::OutsideTolerance(Duration::from_secs(301))));
        }
        assert_eq!(check(&sign(b"[]", at, "whsec_test"), b"[]"), Err(WebhookError::Unreadable));
    }
}
