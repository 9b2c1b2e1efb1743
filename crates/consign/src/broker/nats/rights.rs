//! What a service must be allowed to do on the NATS server, and no more, where it only binds to what is there.

use std::collections::BTreeSet;

use crate::reconcile::Scope;

/// Subjects, as a server's configuration names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rights {
    /// It may publish to these.
    pub publish: Vec<String>,
    /// It may subscribe to these.
    pub subscribe: Vec<String>,
}

/// The least rights of a service with [`Provision::Bind`](super::Provision::Bind) and this inbox prefix.
///
/// It publishes to its own streams, lists their consumers, fetches and acknowledges on its own consumers, asks for the state of both, and reads single messages: its own
/// when it compares its outbox with the stream, others' when the broker gave up delivering them. See the
/// [JetStream API](https://docs.nats.io/reference/reference-protocols/nats_api_reference).
pub fn rights(scope: &Scope, inbox_prefix: &str) -> Rights {
    let mut publish = BTreeSet::new();
    // What the server itself publishes to, nobody else may.
    let own = scope.streams.iter().flat_map(|s| &s.subjects).filter(|s| !s.starts_with("$JS."));
    publish.extend(own.cloned());
    let streams =
        scope.streams.iter().map(|s| &s.name).chain(scope.consumers.iter().map(|(stream, _)| stream));
    for stream in streams {
        publish.insert(format!("$JS.API.STREAM.INFO.{stream}"));
        publish.insert(format!("$JS.API.STREAM.MSG.GET.{stream}"));
    }
    // Who still reads which version of its events.
    publish.extend(scope.streams.iter().map(|s| format!("$JS.API.CONSUMER.LIST.{}", s.name)));
    for (stream, consumer) in &scope.consumers {
        let durable = &consumer.durable;
        publish.insert(format!("$JS.API.CONSUMER.INFO.{stream}.{durable}"));
        publish.insert(format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}"));
        publish.insert(format!("$JS.ACK.{stream}.{durable}.>"));
    }
    Rights { publish: publish.into_iter().collect(), subscribe: vec![format!("{inbox_prefix}.>")] }
}
