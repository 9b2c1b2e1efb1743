//! Inventory's HTTP: products and their stock. Reading is free; writing needs the admin token.

use aide::axum::ApiRouter;
use aide::axum::routing::{get_with, post_with, put_with};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use consign::http::idempotency::{self, fingerprint, key_reused};
use consign::http::{Admin, Body, Correlation, Id, IdempotencyKey, Params, Problem};
use consign::schema::Fault;
use consign::{Db, Emission, Timestamp};
use contracts::{ProductChanged, is_currency, is_product_id};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::domain;
use crate::store;

const MOVE_STOCK: &str = "move stock";

pub fn router(db: Db) -> ApiRouter {
    ApiRouter::new()
        .api_route("/products", get_with(list, |o| o.summary("All products, by id").tag("products")))
        .api_route(
            "/products/{id}",
            get_with(show, |o| o.summary("One product").tag("products")).merge(put_with(put, |o| {
                o.summary("Make or change a product")
                    .tag("products")
                    .response::<200, Json<Product>>()
                    .response::<201, Json<Product>>()
            })),
        )
        .api_route(
            "/products/{id}/stock",
            post_with(move_stock, |o| {
                o.summary("Receive stock, or write it off")
                    .description("Needs an Idempotency-Key: a repeated request must not count twice.")
                    .tag("products")
            }),
        )
        .with_state(db)
}

#[derive(Serialize, Deserialize, JsonSchema)]
struct Product {
    id: String,
    name: String,
    /// In minor units.
    price: i64,
    /// ISO 4217.
    currency: String,
    version: u64,
    on_hand: i64,
    reserved: i64,
    available: i64,
    updated_at: Timestamp,
}

impl From<store::Product> for Product {
    fn from(p: store::Product) -> Self {
        Self {
            on_hand: p.stock.on_hand(),
            reserved: p.stock.reserved(),
            available: p.stock.available(),
            id: p.id,
            name: p.name,
            price: p.price,
            currency: p.currency,
            version: p.version,
            updated_at: p.updated_at,
        }
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ListParams {
    /// 1 to 500; 100 if left out.
    limit: Option<u32>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

#[derive(Serialize, JsonSchema)]
struct Products {
    products: Vec<Product>,
    /// Where the next page begins, if there is one.
    next_cursor: Option<String>,
}

async fn list(State(db): State<Db>, Params(p): Params<ListParams>) -> Result<Json<Products>, Problem> {
    let limit = p.limit.unwrap_or(100);
    if !(1..=500).contains(&limit) {
        return Err(Problem::bad_request("limit: 1 to 500"));
    }
    let mut found = store::list(&db, p.cursor.as_deref().unwrap_or(""), limit + 1).await?;
    let more = found.len() > limit as usize;
    found.truncate(limit as usize);
    let next_cursor = found.last().filter(|_| more).map(|p| p.id.clone());
    Ok(Json(Products { products: found.into_iter().map(Product::from).collect(), next_cursor }))
}

fn unknown(id: &str) -> Problem {
    Problem::not_found(format!("there is no product {id:?}"))
}

async fn show(State(db): State<Db>, Path(Id { id }): Path<Id>) -> Result<Json<Product>, Problem> {
    let found = store::find(&db, &id).await?;
    found.map(|p| Json(p.into())).ok_or_else(|| unknown(&id))
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct PutProduct {
    #[schemars(length(min = 1, max = 200))]
    name: String,
    /// In minor units.
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    price: i64,
    /// ISO 4217.
    #[schemars(length(min = 3, max = 3))]
    currency: String,
}

async fn put(
    _: Admin,
    State(db): State<Db>,
    Path(Id { id }): Path<Id>,
    Correlation(cause): Correlation,
    Body(body): Body<PutProduct>,
) -> Result<(StatusCode, Json<Product>), Problem> {
    let mut faults = Vec::new();
    if !is_product_id(&id) {
        let detail = "a product id is 1 to 64 of A-Z, a-z, 0-9, '_' and '-'".into();
        faults.push(Fault { pointer: String::new(), detail });
    }
    if !is_currency(&body.currency) {
        faults.push(Fault {
            pointer: "/currency".into(),
            detail: "three capital letters, as in ISO 4217".into(),
        });
    }
    if !faults.is_empty() {
        return Err(Problem::unprocessable("the product cannot be taken", faults));
    }
    let mut tx = db.begin_for(cause).await?;
    let product = store::put(&mut tx, &id, &body.name, body.price, &body.currency).await?;
    let event = ProductChanged {
        product_id: product.id.clone(),
        name: product.name.clone(),
        price: product.price,
        currency: product.currency.clone(),
        version: product.version,
    };
    tx.emit(Emission::new(event, &id, product.version).key(&id)).map_err(|e| Problem::internal(&e))?;
    tx.commit().await?;
    let status = if product.version == 1 { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(product.into())))
}

#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct MoveStock {
    /// Above zero: received; below: written off. Not zero.
    #[schemars(range(min = -1_000_000_000_i64, max = 1_000_000_000_i64))]
    delta: i64,
    /// For the record.
    #[schemars(length(min = 1, max = 200))]
    reason: String,
}

async fn move_stock(
    _: Admin,
    State(db): State<Db>,
    Path(Id { id }): Path<Id>,
    Correlation(cause): Correlation,
    IdempotencyKey(key): IdempotencyKey,
    Body(body): Body<MoveStock>,
) -> Result<Json<Product>, Problem> {
    let key = key.ok_or_else(|| {
        Problem::bad_request("the Idempotency-Key header is missing; a repeated request must not count twice")
    })?;
    if body.delta == 0 {
        let fault = Fault { pointer: "/delta".into(), detail: "0 moves nothing".into() };
        return Err(Problem::unprocessable("the movement cannot be taken", vec![fault]));
    }
    let print = fingerprint(&serde_json::json!([&id, &body]));
    let mut tx = db.begin_for(cause).await?;
    if let Some(before) = idempotency::lookup(&mut tx, MOVE_STOCK, &[&key]).await?.remove(&key) {
        tx.rollback().await;
        if before.fingerprint != print {
            return Err(key_reused());
        }
        return serde_json::from_str(&before.answer).map(Json).map_err(|e| Problem::internal(&e));
    }
    let Some(product) = store::find_in(&mut tx, &id).await? else { return Err(unknown(&id)) };
    if let Err(stock) = domain::moved(product.stock, body.delta) {
        return Err(Problem::conflict(format!(
            "{} are on hand and {} of them reserved; {} cannot be taken away",
            stock.on_hand(),
            stock.reserved(),
            body.delta.unsigned_abs()
        )));
    }
    let product = Product::from(store::move_stock(&mut tx, &id, body.delta, &body.reason).await?);
    let answer = serde_json::to_string(&product).map_err(|e| Problem::internal(&e))?;
    idempotency::record(&mut tx, MOVE_STOCK, &[(&key, print, answer)]).await?;
    tx.commit().await?;
    Ok(Json(product))
}
