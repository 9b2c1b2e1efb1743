//! Handlers: plain async functions with extractors, as in axum. The first argument says which events, the others what else is needed.

use std::any::Any;
use std::future::Future;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;

use axum::extract::{FromRef, State};
use serde_json::Value;
use sqlx::postgres::PgDatabaseError;
use thiserror::Error;

use crate::breaker::Rejected;
use crate::db::{DbError, Slot, Tx};
use crate::event::{Envelope, Event, EventId};
use crate::outbox::EmitError;
use crate::schema::{self, CompiledSchema, SchemaViolation};

/// Any error.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why a handler failed, and with it the fate of its event or task.
#[derive(Debug, Error)]
#[error("{error}")]
pub struct Failure {
    pub(crate) fate: Fate,
    #[source]
    pub(crate) error: BoxError,
    pub(crate) culprit: Option<EventId>,
}

/// What becomes of an event or a task whose handler failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Tried again later; a dead letter after too many.
    Retry,
    /// A dead letter at once: no retry would help.
    DeadLetter,
    /// Not the event's fault: the consumer pauses, and nothing is counted.
    Pause,
    /// A circuit breaker refused the call: so does this, until the breaker lets calls through.
    Rejected,
}

impl Failure {
    fn new(fate: Fate, error: impl Into<BoxError>) -> Self {
        Self { fate, error: error.into(), culprit: None }
    }

    /// May work later: retried with backoff, a dead letter after `limit` failures.
    pub fn retry(error: impl Into<BoxError>) -> Self {
        Self::new(Fate::Retry, error)
    }

    /// Will never work: a dead letter at once.
    pub fn dead_letter(error: impl Into<BoxError>) -> Self {
        Self::new(Fate::DeadLetter, error)
    }

    /// The infrastructure's fault, not the event's: the consumer pauses and tries again without counting a failure; a task is tried again
    /// later, and the others go on.
    pub fn pause(error: impl Into<BoxError>) -> Self {
        Self::new(Fate::Pause, error)
    }

    /// In a batch handler: which event is at fault. The others then run again without it.
    #[must_use]
    pub fn of(self, event: &Envelope) -> Self {
        Self { culprit: Some(event.id), ..self }
    }
}

impl From<Rejected> for Failure {
    fn from(e: Rejected) -> Self {
        Self::new(Fate::Rejected, e)
    }
}

impl From<sqlx::Error> for Failure {
    fn from(e: sqlx::Error) -> Self {
        Self::from(DbError::Sql(e))
    }
}

impl From<DbError> for Failure {
    fn from(e: DbError) -> Self {
        let fate = match &e {
            DbError::InvalidEvent(_) => Fate::DeadLetter,
            DbError::TransactionKept => Fate::Retry,
            DbError::Sql(e) if is_statement_fault(e) => Fate::Retry,
            _ => Fate::Pause,
        };
        Self::new(fate, e)
    }
}

impl From<EmitError> for Failure {
    fn from(e: EmitError) -> Self {
        Self::dead_letter(e)
    }
}

impl From<SchemaViolation> for Failure {
    fn from(e: SchemaViolation) -> Self {
        Self::dead_letter(e)
    }
}

/// The statement or its data is wrong, rather than the database away, locked or full.
fn is_statement_fault(e: &sqlx::Error) -> bool {
    match e {
        sqlx::Error::Database(e) => {
            if let Some(e) = e.try_downcast_ref::<PgDatabaseError>() {
                // Data exceptions, violated constraints, unknown names and syntax. All else may pass: locks, deadlocks, shutdowns, limits
                // (https://www.postgresql.org/docs/current/errcodes-appendix.html).
                return ["22", "23", "42"].contains(&e.code().get(..2).unwrap_or_default());
            }
            // SQLite's primary codes for what another try or more room may mend: BUSY, LOCKED, NOMEM, READONLY, INTERRUPT,
            // IOERR, CORRUPT, FULL, CANTOPEN, PROTOCOL (https://sqlite.org/rescode.html).
            let code = e.code().and_then(|c| c.parse::<i32>().ok()).map(|c| c & 0xff);
            !matches!(code, Some(5..=11 | 13..=15))
        }
        sqlx::Error::RowNotFound
        | sqlx::Error::TypeNotFound { .. }
        | sqlx::Error::ColumnIndexOutOfBounds { .. }
        | sqlx::Error::ColumnNotFound(_)
        | sqlx::Error::ColumnDecode { .. }
        | sqlx::Error::Encode(_)
        | sqlx::Error::Decode(_) => true,
        _ => false,
    }
}

pub(crate) type AnyEvent = Arc<dyn Any + Send + Sync>;
pub(crate) type Decode = Arc<dyn Fn(Value) -> Result<AnyEvent, serde_json::Error> + Send + Sync>;
pub(crate) type Convert = Arc<dyn Fn(AnyEvent) -> Option<AnyEvent> + Send + Sync>;

/// What a handler takes: an event; or one of several kinds, so that it gets all of them in the order in which they came.
///
/// Kinds that change the same rows belong in one handler: they are loaded, locked and written once for all of a batch. Handlers of their own
/// would, with several replicas, also need transactions of their own (see [`Consumer::on`](crate::Consumer::on)).
///
/// ```
/// use consign::{Batch, Event, Failure};
/// use consign::handler::{EventSet, Kind};
/// use schemars::JsonSchema;
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Clone, Serialize, Deserialize, JsonSchema, Event)]
/// #[event(type = "parcels.packed", version = 1)]
/// struct Packed { id: u32 }
///
/// #[derive(Clone, Serialize, Deserialize, JsonSchema, Event)]
/// #[event(type = "parcels.lost", version = 1)]
/// struct Lost { id: u32 }
///
/// #[derive(Clone)]
/// enum Parcel { Packed(Packed), Lost(Lost) }
///
/// impl EventSet for Parcel {
///     fn kinds() -> Vec<Kind<Self>> {
///         vec![Kind::of(Self::Packed), Kind::of(Self::Lost)]
///     }
/// }
///
/// async fn parcels(Batch(events): Batch<Parcel>) -> Result<(), Failure> {
///     for event in &events {
///         match &event.event {
///             Parcel::Packed(packed) => println!("{} is packed", packed.id),
///             Parcel::Lost(lost) => println!("{} is lost", lost.id),
///         }
///     }
///     Ok(())
/// }
/// let consumer = consign::Consumer::<()>::new("parcels", "PARCELS").on(parcels);
/// ```
pub trait EventSet: Clone + Send + Sync + 'static {
    /// The events, each with what it is called here.
    fn kinds() -> Vec<Kind<Self>>;
}

impl<E: Event> EventSet for E {
    fn kinds() -> Vec<Kind<Self>> {
        // It is that already.
        vec![Kind { wrap: Arc::new(Some), ..Kind::of(|event| event) }]
    }
}

/// One of the events of an [`EventSet`].
pub struct Kind<T> {
    pub(crate) name: String,
    pub(crate) schema: Arc<CompiledSchema>,
    pub(crate) decode: Decode,
    /// From the event to `T`.
    pub(crate) wrap: Convert,
    set: PhantomData<fn() -> T>,
}

impl<T: EventSet> Kind<T> {
    /// The event that `wrap` makes a `T` of.
    pub fn of<E: Event>(wrap: fn(E) -> T) -> Self {
        Self {
            name: E::name(),
            schema: schema::of::<E>(),
            decode: Arc::new(move |value| Ok(Arc::new(wrap(serde_json::from_value(value)?)) as AnyEvent)),
            wrap: Arc::new(move |event| Some(Arc::new(wrap(event.downcast_ref::<E>()?.clone())) as AnyEvent)),
            set: PhantomData,
        }
    }
}

/// A decoded event and its envelope, before its type is known again.
#[derive(Clone, Debug)]
pub struct Incoming {
    pub(crate) envelope: Arc<Envelope>,
    pub(crate) event: AnyEvent,
}

/// One call of a handler: one event, or for a batch handler all of the batch's. Layers wrap this.
#[derive(Clone, Debug)]
pub struct Call {
    pub(crate) events: Arc<[Incoming]>,
    pub(crate) slot: Slot,
    pub(crate) consumer: Arc<str>,
}

impl Call {
    /// The logical consumer that is handling.
    pub fn consumer(&self) -> &str {
        &self.consumer
    }

    /// The envelopes of the events handled.
    pub fn envelopes(&self) -> impl Iterator<Item = &Envelope> {
        self.events.iter().map(|e| &*e.envelope)
    }
}

/// First argument of a handler that takes events one by one.
#[derive(Clone, Debug)]
pub struct Received<E>(pub E);

/// First argument of a handler that takes all events of a batch at once.
#[derive(Clone, Debug)]
pub struct Batch<E>(pub Vec<Item<E>>);

/// An event of a batch.
#[derive(Clone, Debug)]
pub struct Item<E> {
    /// The event; also reached through `Deref`.
    pub event: E,
    /// Its attributes.
    pub envelope: Arc<Envelope>,
}

impl<E> Deref for Item<E> {
    type Target = E;
    fn deref(&self) -> &E {
        &self.event
    }
}

/// The envelope of the event being handled.
#[derive(Clone, Debug)]
pub struct Meta(pub Arc<Envelope>);

/// An argument of a handler after the first.
pub trait FromCall<S>: Sized {
    /// Takes it from the call, or says why it cannot be had.
    fn from_call(call: &Call, state: &S) -> Result<Self, Failure>;
}

impl<S, T: FromRef<S>> FromCall<S> for State<T> {
    fn from_call(_: &Call, state: &S) -> Result<Self, Failure> {
        Ok(Self(T::from_ref(state)))
    }
}

impl<S> FromCall<S> for Tx {
    fn from_call(call: &Call, _: &S) -> Result<Self, Failure> {
        call.slot.lend().ok_or_else(|| Failure::retry("the handler asks for the transaction twice"))
    }
}

impl<S> FromCall<S> for Meta {
    fn from_call(call: &Call, _: &S) -> Result<Self, Failure> {
        first(call).map(|e| Self(Arc::clone(&e.envelope)))
    }
}

fn first(call: &Call) -> Result<&Incoming, Failure> {
    call.events.first().ok_or_else(|| Failure::retry("a call without an event"))
}

fn typed<E: EventSet>(incoming: &Incoming) -> Result<E, Failure> {
    incoming
        .event
        .downcast_ref::<E>()
        .cloned()
        .ok_or_else(|| Failure::retry("routed to a handler of another event"))
}

/// An async function that handles an event. Implemented for functions of [`Received`] or [`Batch`] and up to five extractors.
pub trait Handler<Args, S>: Clone + Send + Sync + 'static {
    /// The event it handles, or the kinds of them.
    type Takes: EventSet;
    /// Whether it takes whole batches.
    const BATCH: bool;
    /// Runs it.
    fn call(self, call: Call, state: S) -> impl Future<Output = Result<(), Failure>> + Send;
}

macro_rules! impl_handler {
    ($($T:ident),*) => {
        #[allow(non_snake_case, unused_variables)]
        impl<F, Fut, S, E, $($T,)*> Handler<(Received<E>, $($T,)*), S> for F
        where
            F: Fn(Received<E>, $($T),*) -> Fut + Clone + Send + Sync + 'static,
            Fut: Future<Output = Result<(), Failure>> + Send,
            S: Send + Sync + 'static,
            E: EventSet,
            $($T: FromCall<S> + Send,)*
        {
            type Takes = E;
            const BATCH: bool = false;
            async fn call(self, call: Call, state: S) -> Result<(), Failure> {
                let event = Received(typed::<E>(first(&call)?)?);
                $(let $T = $T::from_call(&call, &state)?;)*
                self(event, $($T),*).await
            }
        }

        #[allow(non_snake_case, unused_variables)]
        impl<F, Fut, S, E, $($T,)*> Handler<(Batch<E>, $($T,)*), S> for F
        where
            F: Fn(Batch<E>, $($T),*) -> Fut + Clone + Send + Sync + 'static,
            Fut: Future<Output = Result<(), Failure>> + Send,
            S: Send + Sync + 'static,
            E: EventSet,
            $($T: FromCall<S> + Send,)*
        {
            type Takes = E;
            const BATCH: bool = true;
            async fn call(self, call: Call, state: S) -> Result<(), Failure> {
                let items = call.events.iter().map(|e| {
                    Ok(Item { event: typed::<E>(e)?, envelope: Arc::clone(&e.envelope) })
                });
                let batch = Batch(items.collect::<Result<_, Failure>>()?);
                $(let $T = $T::from_call(&call, &state)?;)*
                self(batch, $($T),*).await
            }
        }
    };
}
impl_handler!();
impl_handler!(T1);
impl_handler!(T1, T2);
impl_handler!(T1, T2, T3);
impl_handler!(T1, T2, T3, T4);
impl_handler!(T1, T2, T3, T4, T5);
