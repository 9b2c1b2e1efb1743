//! Orders that somebody outside asks for by publishing an event, instead of over HTTP. Each is answered by one: `orders.created` or
//! `orders.refused`, about the id that was asked for.

use axum::extract::State;
use consign::handler::Item;
use consign::http::idempotency::{self, fingerprint};
use consign::schema::Fault;
use consign::{Batch, Consumer, ConsumerOptions, Emission, Failure, Tx};
use contracts::{OrderFault, OrderRefused, OrderRequested, streams};
use uuid::Uuid;

use crate::accept::{self, Answer, Request, Terms};
use crate::domain::Wanted;
use crate::store;

/// Under which the ids that were asked for are kept: the same id again is answered once.
const OPERATION: &str = "order requested by event";
const TAKEN: &str = "this id has been used for another order; make a new one (a UUID) for each";

/// What shops and others outside ask for.
pub fn consumer(options: ConsumerOptions) -> Consumer<Terms> {
    Consumer::new("order-requests", streams::STOREFRONT).options(options).on(requested).from_outside()
}

fn request(event: &Item<OrderRequested>) -> Result<Request, Failure> {
    let asked = serde_json::to_value(&**event).map_err(Failure::dead_letter)?;
    Ok(Request {
        order_id: event.order_id,
        customer_id: event.customer_id.clone(),
        wanted: event
            .items
            .iter()
            .map(|i| Wanted { product_id: i.product_id.clone(), quantity: i.quantity })
            .collect(),
        lane: event.envelope.lane,
        payment_method: event.payment_method.clone(),
        shipping_address: event.shipping_address.clone(),
        gift_note: event.gift_note.clone(),
        key: Some((event.order_id.to_string(), fingerprint(&asked))),
        cause: event.envelope.as_cause(),
    })
}

async fn requested(
    Batch(events): Batch<OrderRequested>,
    State(terms): State<Terms>,
    mut tx: Tx,
) -> Result<(), Failure> {
    let ids: Vec<Uuid> = events.iter().map(|e| e.order_id).collect();
    let keys: Vec<String> = ids.iter().map(Uuid::to_string).collect();
    let asked =
        idempotency::lookup(&mut tx, OPERATION, &keys.iter().map(String::as_str).collect::<Vec<_>>()).await?;
    let orders = store::load(&mut tx, &ids).await?;
    let mut requests = Vec::with_capacity(events.len());
    for (event, key) in events.iter().zip(&keys) {
        let request = request(event).map_err(|f| f.of(&event.envelope))?;
        let mut faults = request.faults();
        if orders.contains_key(&event.order_id) && !asked.contains_key(key) {
            faults.push(Fault { pointer: "/order_id".to_owned(), detail: TAKEN.to_owned() });
        }
        if faults.is_empty() {
            requests.push((event, request));
        } else {
            refuse(&mut tx, event, faults.into_iter().map(|f| (f.pointer, f.detail)))?;
        }
    }
    let (events, requests): (Vec<_>, Vec<_>) = requests.into_iter().unzip();
    let answers = accept::accept(&mut tx, OPERATION, &requests, &terms).await?;
    for (event, answer) in events.into_iter().zip(answers) {
        match answer {
            Answer::Accepted { .. } => {}
            Answer::Refused(faults) => {
                let faults = faults.iter().map(|f| (format!("/items/{}", f.line()), f.to_string()));
                refuse(&mut tx, event, faults)?;
            }
            Answer::KeyReused => {
                refuse(&mut tx, event, [("/order_id".to_owned(), TAKEN.to_owned())].into_iter())?;
            }
        }
    }
    Ok(())
}

fn refuse(
    tx: &mut Tx,
    event: &Item<OrderRequested>,
    faults: impl Iterator<Item = (String, String)>,
) -> Result<(), Failure> {
    // More than the event holds would leave its sender without an answer.
    let faults = faults.take(OrderRefused::MAX_FAULTS);
    let faults = faults.map(|(pointer, detail)| OrderFault { pointer, detail }).collect();
    let refused = OrderRefused { order_id: event.order_id, faults };
    let emission = Emission::new(refused, event.order_id.to_string(), 1)
        .lane(event.envelope.lane)
        .caused_by(event.envelope.as_cause());
    tx.emit(emission).map_err(|e| Failure::from(e).of(&event.envelope))?;
    Ok(())
}
