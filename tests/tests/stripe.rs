//! Payments through Stripe's API: against localstripe, behind a proxy that remembers idempotency keys and breaks things.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::time::Duration;

use consign::{Clock, Timestamp};
use consign_tests::System;
use consign_tests::stripe::{API_KEY, Fault, Stripe, WEBHOOK_SECRET};
use payment::gateway::stripe::{Capture, StripeConfig, StripeGateway};
use payment::gateway::{
    Answer, Charge, Gateway, GatewayConfig, GatewayError, Kind, PaymentGateway, Refund, Refunded,
};
use serde_json::json;
use std::sync::Arc;
use uuid::Uuid;

fn config(stripe: &Stripe) -> StripeConfig {
    StripeConfig {
        base_url: stripe.url.clone(),
        api_key: Some(API_KEY.to_owned().into()),
        webhook_secret: Some(WEBHOOK_SECRET.to_owned().into()),
        ca_file: Some(stripe.ca_file.clone()),
        payment_method_types: vec!["card".into(), "sepa_debit".into()],
        ..StripeConfig::default()
    }
}

fn charge(method: Option<&str>) -> Charge {
    Charge {
        payment_id: Uuid::now_v7(),
        order_id: Uuid::now_v7(),
        amount: 2500,
        currency: "EUR".into(),
        method: method.map(str::to_owned),
        reference: None,
        not_after: Timestamp::from_millis(i64::MAX / 2),
        attempt: 1,
    }
}

/// Calls until there is an answer for good, as the task does; what is prepared is stored.
async fn carry_through(gateway: &Gateway, charge: &mut Charge) -> Answer {
    for _ in 0..40 {
        charge.attempt += 10;
        match gateway.charge(charge.clone()).await {
            Ok(Answer::Prepared(reference)) => charge.reference = Some(reference),
            Ok(Answer::Processing) | Err(GatewayError::Unavailable(_) | GatewayError::Rejected(_)) => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok(answer) => return answer,
            Err(e) => panic!("{e}"),
        }
    }
    panic!("no answer after 40 attempts")
}

fn guarded(stripe: &StripeConfig) -> Gateway {
    // Short, for what hangs; and a breaker that a test of single faults never opens.
    let mut config =
        GatewayConfig { timeout: Duration::from_millis(400), retries: 0, ..GatewayConfig::default() };
    config.breaker.min_calls = 100;
    Gateway::new("stripe-test", Arc::new(StripeGateway::new(stripe).unwrap()), &config, Clock::system())
}

async fn charges(stripe: &Stripe) -> usize {
    stripe.all("charges").await.iter().filter(|c| c["status"] == "succeeded").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_charge_is_prepared_then_made_and_made_once() {
    let stripe = Stripe::start().await;
    let gateway = StripeGateway::new(&config(&stripe)).unwrap();
    let mut charge = charge(Some("pm_card_visa"));
    assert_eq!(gateway.lookup(&charge).await.unwrap(), None);
    let Answer::Prepared(reference) = gateway.charge(&charge).await.unwrap() else { panic!() };
    assert_eq!(charges(&stripe).await, 0, "nothing is charged before the reference is stored");
    charge.reference = Some(reference.clone());
    assert_eq!(gateway.lookup(&charge).await.unwrap(), None);
    assert_eq!(gateway.charge(&charge).await.unwrap(), Answer::Charged);
    // A day later, with all keys forgotten.
    stripe.forget_keys();
    assert_eq!(gateway.charge(&charge).await.unwrap(), Answer::Charged);
    assert_eq!(gateway.lookup(&charge).await.unwrap(), Some(Answer::Charged));
    assert_eq!(gateway.cancel(&charge).await.unwrap(), Answer::Charged, "too late to cancel");
    assert_eq!(charges(&stripe).await, 1);
    let intent = stripe.all("payment_intents").await.remove(0);
    assert_eq!(intent["metadata"]["payment_id"], charge.payment_id.to_string());
    let other = Charge { amount: 9, ..charge };
    assert!(matches!(gateway.charge(&other).await, Err(GatewayError::Refused(_))), "another amount");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_charged_is_declined_and_can_never_be_paid_later() {
    let stripe = Stripe::start().await;
    let gateway = guarded(&config(&stripe));
    let needs_a_person = stripe.card("4000002500003155").await;
    for (method, why) in [
        (Some("pm_card_chargeCustomerFail"), "card_declined"),
        (Some(&*needs_a_person), "authentication_required"),
        (None, "no_payment_method"),
    ] {
        let answer = carry_through(&gateway, &mut charge(method)).await;
        assert_eq!(answer, Answer::Declined(why.into()));
    }
    let intents = stripe.all("payment_intents").await;
    assert!(intents.iter().all(|i| i["status"] == "canceled"), "{intents:?}");
    let unknown = gateway.charge(charge(Some("pm_unknown"))).await;
    assert!(matches!(unknown, Err(GatewayError::Refused(_))), "{unknown:?}");
    assert_eq!(charges(&stripe).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_cancelled_before_it_is_confirmed_is_never_charged() {
    let stripe = Stripe::start().await;
    let gateway = StripeGateway::new(&config(&stripe)).unwrap();
    let mut charge = charge(Some("pm_card_visa"));
    assert_eq!(gateway.cancel(&charge).await.unwrap(), Answer::Declined("cancelled".into()));
    let Answer::Prepared(reference) = gateway.charge(&charge).await.unwrap() else { panic!() };
    charge.reference = Some(reference);
    for _ in 0..2 {
        assert_eq!(gateway.cancel(&charge).await.unwrap(), Answer::Declined("cancelled".into()));
    }
    assert_eq!(gateway.charge(&charge).await.unwrap(), Answer::Declined("cancelled".into()));
    assert_eq!(charges(&stripe).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_may_go_wrong_in_every_way_and_each_order_is_charged_once() {
    let stripe = Stripe::start().await;
    for capture in [Capture::Automatic, Capture::Manual] {
        let config = StripeConfig { capture, ..config(&stripe) };
        let mut ends = vec!["/v1/payment_intents", "/confirm"];
        if capture == Capture::Manual {
            ends.push("/capture");
        }
        for end in ends {
            for fault in Fault::ALL {
                let gateway = guarded(&config);
                let before = charges(&stripe).await;
                stripe.goes_wrong(end, &[fault, fault]);
                let answer = carry_through(&gateway, &mut charge(Some("pm_card_visa"))).await;
                assert_eq!(answer, Answer::Charged, "{end} {fault:?}");
                assert_eq!(charges(&stripe).await, before + 1, "{end} {fault:?}");
                assert!(stripe.all_went_wrong() || fault == Fault::AnswerLost || fault == Fault::Hangs);
                // What took effect needs no second call, so its second fault is still to come.
                while !stripe.all_went_wrong() {
                    carry_through(&gateway, &mut charge(Some("pm_card_visa"))).await;
                }
            }
        }
    }
    let keys: Vec<_> = stripe.made().into_iter().filter(|m| m.what.starts_with("POST")).collect();
    assert!(keys.iter().all(|m| m.key.is_some()), "every change has a key");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refund_is_made_once_whatever_goes_wrong() {
    let stripe = Stripe::start().await;
    for fault in Fault::ALL {
        let gateway = guarded(&config(&stripe));
        let mut charge = charge(Some("pm_card_visa"));
        assert_eq!(carry_through(&gateway, &mut charge).await, Answer::Charged);
        let before = stripe.all("refunds").await.len();
        for amount in [500, 2000] {
            let refund = Refund { refund_id: Uuid::now_v7(), charge: charge.clone(), amount };
            stripe.goes_wrong("/v1/refunds", &[fault]);
            let mut made = gateway.refund(refund.clone()).await;
            for _ in 0..20 {
                if made.is_ok() {
                    break;
                }
                // Stripe keeps an error for a day.
                stripe.forget_keys();
                made = gateway.refund(refund.clone()).await;
            }
            assert_eq!(made.unwrap(), Refunded::Done, "{fault:?}");
            assert_eq!(gateway.refund(refund).await.unwrap(), Refunded::Done, "repeated");
        }
        let refunds = stripe.all("refunds").await;
        assert_eq!(refunds.len(), before + 2, "{fault:?}");
        let reference = charge.reference.as_deref().unwrap();
        let ours = refunds.iter().filter(|r| r["payment_intent"] == reference);
        assert_eq!(ours.map(|r| r["amount"].as_i64().unwrap()).sum::<i64>(), 2500);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_or_an_unknown_authority_is_an_outage_and_says_why() {
    let stripe = Stripe::start().await;
    let wrong = StripeConfig { api_key: Some("pk_wrong".to_owned().into()), ..config(&stripe) };
    let error = StripeGateway::new(&wrong).unwrap().charge(&charge(Some("pm_card_visa"))).await.unwrap_err();
    let said = consign::telemetry::chain(&error);
    assert!(error.is_outage() && said.contains("api_key") && !said.contains("pk_wrong"), "{said}");
    let strangers = StripeConfig { ca_file: None, ..config(&stripe) };
    let error =
        StripeGateway::new(&strangers).unwrap().charge(&charge(Some("pm_card_visa"))).await.unwrap_err();
    let said = consign::telemetry::chain(&error).to_lowercase();
    assert!(error.is_outage() && said.contains("certificate"), "{said}");
    assert!(stripe.made().iter().all(|m| m.status == 401), "nothing is said to a stranger");
}

async fn system(stripe: &Stripe) -> System {
    let config = config(stripe);
    System::start_paying(move |payment| {
        payment.gateway.kind = Kind::Stripe;
        // Its clock is real, and ours is not.
        payment.gateway.stripe = StripeConfig { webhook_tolerance: Duration::from_secs(1 << 31), ..config };
    })
    .await
}

#[tokio::test(start_paused = true)]
async fn orders_are_paid_declined_and_refunded_through_stripe() {
    let stripe = Stripe::start().await;
    let system = system(&stripe).await;
    let paid = system.place_paid_with("book", 3, Some("pm_card_visa")).await;
    let declined = system.place_paid_with("lamp", 1, Some("pm_card_chargeCustomerFail")).await;
    let without = system.place("lamp", 1).await;
    system.until(&paid, "confirmed").await;
    system.until(&declined, "cancelled").await;
    system.until(&without, "cancelled").await;
    let reason = system.payment_of(&declined).await["reason"].clone();
    assert_eq!(reason, "declined: card_declined");
    assert_eq!(system.payment_of(&without).await["reason"], "declined: no_payment_method");
    let payment = system.payment_of(&paid).await;
    assert!(payment["reference"].as_str().unwrap().starts_with("pi_"), "{payment}");
    let part = json!({"lines": [{"product_id": "book", "quantity": 1}]});
    assert_eq!(system.refund(&paid, "a", &part).await.0, 202);
    let given_back = async || system.order(&paid).await["refunded"] == 1000;
    system.bench.time.until("given back", given_back).await;
    let refunds = stripe.all("refunds").await;
    assert_eq!((refunds.len(), &refunds[0]["amount"]), (1, &json!(1000)));
    system.settled().await;
    assert_eq!(charges(&stripe).await, 1);
}

#[tokio::test(start_paused = true)]
async fn a_webhook_brings_the_outcome_of_what_takes_its_time() {
    let stripe = Stripe::start().await;
    let system = system(&stripe).await;
    let webhooks = format!("http://{}/webhooks/stripe", system.payment.address());
    stripe.call_back(&webhooks).await;
    let form = [("type", "sepa_debit"), ("sepa_debit[iban]", "DE89370400440532013000")];
    let slow = stripe.method(&form).await;
    let id = system.place_paid_with("book", 1, Some(&slow)).await;
    // Time stands still, so nobody asks again but for the webhook; it comes a second and a half later.
    system.until(&id, "confirmed").await;
    let taken = async || {
        let kinds = "SELECT COUNT(*) AS n FROM callbacks WHERE kind = 'payment_intent.succeeded'";
        system.payment.db().query(kinds).fetch_scalar::<u64>().await.unwrap() == 1
    };
    system.bench.time.until("the webhook", taken).await;
    let http = reqwest::Client::new();
    let forged =
        http.post(&webhooks).header("stripe-signature", "t=1,v1=00").body("{}").send().await.unwrap();
    assert_eq!(forged.status(), 400);
    assert_eq!(charges(&stripe).await, 1);
    system.settled().await;
}
