//! What every broker must do, written against the trait: each test is named after the promise it checks. Run it with
//! [`run`], handing in how to make a broker and how to let time pass.
#![allow(clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::broker::{
    Broker, BrokerError, ConsumerConfig, DeliverPolicy, Delivery, Discard, Find, Message, PubAck,
    PublishError, Settlement, StreamConfig,
};

/// A broker under test.
pub trait Subject: Sync {
    /// All durations of the suite are divided by this: 1 where time is virtual.
    const HASTE: u32;
    /// What is there is fetched within this; as long must nothing come where nothing may.
    const SOON: Duration;
    /// A fresh, empty broker.
    fn fresh(&self) -> impl Future<Output = Arc<dyn Broker>>;
    /// Lets this much of the broker's time pass.
    fn pass(&self, time: Duration) -> impl Future<Output = ()>;
    /// Stops the broker and starts it again on what it stored; none if it keeps nothing.
    fn restart(&self, broker: Arc<dyn Broker>) -> impl Future<Output = Option<Arc<dyn Broker>>>;
}

/// The suite's names for what it asks of a subject.
trait Suite: Subject {
    /// A duration of the suite in the broker's time.
    fn time(&self, seconds: u32) -> Duration {
        Duration::from_secs(seconds.into()) / Self::HASTE
    }
    fn ack_wait(&self) -> Duration {
        self.time(30)
    }
    fn consumer(&self) -> ConsumerConfig {
        ConsumerConfig { ack_wait: self.ack_wait(), ..ConsumerConfig::new("c", Vec::new()) }
    }
    /// Passes a little more than AckWait.
    async fn pass_ack_wait(&self) {
        self.pass(self.ack_wait() + Self::SOON).await;
    }
}
impl<T: Subject> Suite for T {}

type Test<'a> = (&'static str, Pin<Box<dyn Future<Output = ()> + 'a>>);

/// Runs the whole suite, one test after the other; panics at the first broken promise.
pub async fn run(subject: &impl Subject) {
    for (name, test) in tests(subject) {
        println!("conformance: {name}");
        test.await;
    }
}

/// The same, all tests together: for brokers on real time, each on one of its own.
pub async fn run_together(subject: &impl Subject) {
    let tests = tests(subject).into_iter().map(|(name, test)| async move {
        test.await;
        println!("conformance: {name}");
    });
    futures_util::future::join_all(tests).await;
}

fn tests(subject: &impl Subject) -> Vec<Test<'_>> {
    vec![
        ("publish and fetch in order", Box::pin(publish_and_fetch_in_order(subject))),
        ("a known id is not stored again within the window", Box::pin(duplicates(subject))),
        ("subjects nobody stores are refused", Box::pin(no_stream(subject))),
        ("filters", Box::pin(filters(subject))),
        ("unsettled deliveries come again after AckWait", Box::pin(ack_wait(subject))),
        ("progress starts the wait anew", Box::pin(progress(subject))),
        ("a nak comes again after its delay", Box::pin(nak(subject))),
        ("a terminated message never comes again, and is announced", Box::pin(term(subject))),
        ("backoff overrides AckWait", Box::pin(backoff(subject))),
        ("after max_deliver a message is given up and announced", Box::pin(max_deliver(subject))),
        ("max_ack_pending holds", Box::pin(max_ack_pending(subject))),
        ("deliver policies", Box::pin(deliver_policies(subject))),
        ("a full stream refuses, or drops the oldest, as told", Box::pin(limits(subject))),
        ("the last of each subject", Box::pin(last_per_subject(subject))),
        ("messages age out", Box::pin(max_age(subject))),
        ("info tells the truth", Box::pin(info(subject))),
        ("two fetchers share, and none gets what another has", Box::pin(competing(subject))),
        ("a fetch waits for the next message", Box::pin(fetch_waits(subject))),
        ("configuration that cannot be is refused", Box::pin(bad_configuration(subject))),
        ("a consumer that is changed keeps its place", Box::pin(consumer_changes(subject))),
        ("messages are found by subject", Box::pin(find(subject))),
        ("all consumers of a stream are listed", Box::pin(list(subject))),
        ("a narrower filter passes nothing over", Box::pin(narrower(subject))),
        ("what is unsettled comes again although the filter leaves it out", Box::pin(left_out(subject))),
        ("a consumer can be rewound", Box::pin(rewind(subject))),
        ("what is acknowledged survives a restart", Box::pin(restart(subject))),
    ]
}

fn message(to: &str, id: &str) -> Message {
    Message {
        subject: to.into(),
        msg_id: Some(id.into()),
        headers: vec![("x-test".into(), id.into())],
        payload: Bytes::from(format!("payload of {id}")),
    }
}

fn stream() -> StreamConfig {
    StreamConfig::new("S", &["s.>"])
}

async fn with_stream(subject: &impl Subject, config: StreamConfig) -> Arc<dyn Broker> {
    let broker = subject.fresh().await;
    broker.ensure_stream(&config).await.expect("a stream");
    broker
}

async fn with_consumer(subject: &impl Subject, config: ConsumerConfig) -> Arc<dyn Broker> {
    let broker = with_stream(subject, stream()).await;
    broker.ensure_consumer("S", &config).await.expect("a consumer");
    broker
}

async fn publish(broker: &Arc<dyn Broker>, subjects_and_ids: &[(&str, &str)]) -> Vec<PubAck> {
    let messages = subjects_and_ids.iter().map(|(s, id)| message(s, id)).collect();
    broker.publish(messages).await.into_iter().map(|a| a.expect("an acknowledgement")).collect()
}

/// Exactly `count` messages, in as many fetches as it takes: a fetch may return before its batch is full.
async fn fetch<T: Subject>(_: &T, broker: &Arc<dyn Broker>, count: usize) -> Vec<Delivery> {
    fetch_from::<T>(broker, "c", count).await
}

async fn fetch_from<T: Subject>(broker: &Arc<dyn Broker>, durable: &str, count: usize) -> Vec<Delivery> {
    let mut got = Vec::new();
    while got.len() < count {
        let more = broker.fetch("S", durable, count - got.len(), T::SOON * 8).await.expect("a fetch");
        assert!(!more.is_empty(), "{count} messages were expected, and there came {:?}", ids(&got));
        got.extend(more);
    }
    got
}

/// A fetch that must come back empty; time passes meanwhile.
async fn nothing<T: Subject>(subject: &T, broker: &Arc<dyn Broker>) {
    let (got, ()) = tokio::join!(broker.fetch("S", "c", 10, T::SOON), subject.pass(T::SOON * 2));
    assert_eq!(ids(&got.expect("a fetch")), Vec::<String>::new());
}

fn ids(deliveries: &[Delivery]) -> Vec<String> {
    deliveries.iter().map(|d| d.message.message.msg_id.clone().expect("an id")).collect()
}

async fn settle(broker: &Arc<dyn Broker>, deliveries: &[Delivery], how: &Settlement) {
    let all = deliveries.iter().map(|d| (d.reply.clone(), how.clone())).collect();
    broker.settle("S", "c", all).await.expect("settled");
}

async fn publish_and_fetch_in_order(subject: &impl Subject) {
    let broker = with_consumer(subject, subject.consumer()).await;
    let acks = publish(&broker, &[("s.a", "1"), ("s.b", "2"), ("s.a", "3")]).await;
    assert_eq!(acks.iter().map(|a| a.sequence).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(acks.iter().all(|a| !a.duplicate && &*a.stream == "S"));
    let got = fetch(subject, &broker, 3).await;
    assert_eq!(ids(&got), ["1", "2", "3"]);
    let first = &got[0].message.message;
    assert_eq!(
        (first.subject.as_str(), first.header("X-Test"), &first.payload[..]),
        ("s.a", Some("1"), &b"payload of 1"[..])
    );
    assert!(got.iter().all(|d| d.delivered == 1));
    settle(&broker, &got, &Settlement::Ack).await;
    nothing(subject, &broker).await;
    let stored = broker.get("S", 2).await.expect("a look").expect("a message");
    assert_eq!(stored.message.msg_id.as_deref(), Some("2"));
    assert!(broker.get("S", 9).await.expect("a look").is_none());
}

async fn duplicates(subject: &impl Subject) {
    let window = subject.time(120);
    let broker = with_stream(subject, StreamConfig { duplicate_window: window, ..stream() }).await;
    let first = publish(&broker, &[("s.a", "1")]).await.remove(0);
    let again = publish(&broker, &[("s.a", "1")]).await.remove(0);
    assert_eq!((again.sequence, again.duplicate), (first.sequence, true));
    // In one pipeline too.
    let both = publish(&broker, &[("s.a", "2"), ("s.a", "2")]).await;
    assert_eq!((both[0].duplicate, both[1].duplicate, both[0].sequence), (false, true, both[1].sequence));
    subject.pass(window + subject.time(10)).await;
    let later = publish(&broker, &[("s.a", "1")]).await.remove(0);
    assert!(!later.duplicate && later.sequence > first.sequence, "the window is over");
}

async fn no_stream(subject: &impl Subject) {
    let broker = with_stream(subject, stream()).await;
    let with_header = |name: &str, value: &str| Message {
        headers: vec![(name.to_owned(), value.to_owned())],
        ..message("s.a", name)
    };
    let answers = broker
        .publish(vec![
            message("t.a", "1"),
            message("s.*", "2"),
            message("s.a", "3"),
            with_header("two", "lines\r\nforged: yes"),
            with_header("a colon:", "x"),
        ])
        .await;
    for refused in &answers[3..] {
        assert!(matches!(refused, Err(PublishError::InvalidHeader(_))), "{refused:?}");
    }
    assert!(matches!(answers[0], Err(PublishError::NoStream(_))), "{:?}", answers[0]);
    assert!(matches!(answers[1], Err(PublishError::InvalidSubject(_))), "{:?}", answers[1]);
    assert!(answers[2].is_ok(), "one refused message does not hold up the others");
    assert!(matches!(broker.stream_info("T").await, Err(BrokerError::NoStream(_))));
    assert!(matches!(
        broker.fetch("S", "nobody", 1, subject.time(6)).await,
        Err(BrokerError::NoConsumer { .. })
    ));
}

async fn filters(subject: &impl Subject) {
    let config =
        ConsumerConfig { filter_subjects: vec!["s.a.>".into(), "s.b.x".into()], ..subject.consumer() };
    let broker = with_consumer(subject, config).await;
    publish(&broker, &[("s.a.b", "1"), ("s.b.b", "2"), ("s.b.x", "3"), ("s.a.b.c", "4"), ("s.a.x", "5")])
        .await;
    assert_eq!(ids(&fetch(subject, &broker, 4).await), ["1", "3", "4", "5"]);
    nothing(subject, &broker).await;
}

async fn ack_wait(subject: &impl Subject) {
    let broker = with_consumer(subject, subject.consumer()).await;
    publish(&broker, &[("s.a", "1"), ("s.a", "2")]).await;
    let got = fetch(subject, &broker, 2).await;
    settle(&broker, &got[..1], &Settlement::Ack).await;
    nothing(subject, &broker).await;
    subject.pass(subject.ack_wait()).await;
    let again = fetch(subject, &broker, 1).await;
    assert_eq!(ids(&again), ["2"]);
    assert_eq!(again[0].delivered, 2);
    // The first delivery's reply settles it still, and settling twice is no error.
    settle(&broker, &got, &Settlement::Ack).await;
    settle(&broker, &got, &Settlement::Ack).await;
    subject.pass(subject.ack_wait() * 2).await;
    nothing(subject, &broker).await;
}

async fn progress(subject: &impl Subject) {
    let broker = with_consumer(subject, subject.consumer()).await;
    publish(&broker, &[("s.a", "1")]).await;
    let got = fetch(subject, &broker, 1).await;
    for _ in 0..3 {
        subject.pass(subject.ack_wait() / 2).await;
        nothing(subject, &broker).await;
        settle(&broker, &got, &Settlement::Progress).await;
    }
    subject.pass_ack_wait().await;
    assert_eq!(ids(&fetch(subject, &broker, 1).await), ["1"]);
}

async fn nak(subject: &impl Subject) {
    let broker = with_consumer(subject, subject.consumer()).await;
    publish(&broker, &[("s.a", "1"), ("s.a", "2")]).await;
    let got = fetch(subject, &broker, 1).await;
    let delay = subject.time(12);
    settle(&broker, &got, &Settlement::Nak(delay)).await;
    let rest = fetch(subject, &broker, 1).await;
    assert_eq!(ids(&rest), ["2"], "a nak holds up nobody else");
    settle(&broker, &rest, &Settlement::Ack).await;
    nothing(subject, &broker).await;
    subject.pass(delay).await;
    let again = fetch(subject, &broker, 1).await;
    assert_eq!((ids(&again), again[0].delivered), (vec!["1".to_owned()], 2));
}

/// The advisories captured, once there are `count`: they are published after the fact.
async fn advisories<T: Subject>(subject: &T, broker: &Arc<dyn Broker>, count: u64) -> Vec<serde_json::Value> {
    let mut last = 0;
    for _ in 0..40 {
        last = broker.stream_info("ADVISORIES").await.expect("info").last_sequence;
        if last >= count {
            break;
        }
        subject.pass(T::SOON).await;
    }
    let mut found = Vec::new();
    for sequence in 1..=last {
        let stored = broker.get("ADVISORIES", sequence).await.expect("a look").expect("an advisory");
        found.push(serde_json::from_slice(&stored.message.payload).expect("JSON"));
    }
    found
}

async fn capture_advisories(broker: &Arc<dyn Broker>) {
    let config = StreamConfig::new(
        "ADVISORIES",
        &["$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.>", "$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.>"],
    );
    broker.ensure_stream(&config).await.expect("a stream for advisories");
}

async fn term(subject: &impl Subject) {
    let broker = with_consumer(subject, subject.consumer()).await;
    capture_advisories(&broker).await;
    publish(&broker, &[("s.a", "1")]).await;
    let got = fetch(subject, &broker, 1).await;
    settle(&broker, &got, &Settlement::Term("poison".into())).await;
    subject.pass(subject.ack_wait() * 2).await;
    nothing(subject, &broker).await;
    let told = advisories(subject, &broker, 1).await;
    assert_eq!((told.len(), &told[0]["stream_seq"], &told[0]["consumer"]), (1, &1.into(), &"c".into()));
}

async fn backoff(subject: &impl Subject) {
    let waits = vec![subject.time(6), subject.time(30)];
    let broker =
        with_consumer(subject, ConsumerConfig { backoff: waits.clone(), ..subject.consumer() }).await;
    publish(&broker, &[("s.a", "1")]).await;
    fetch(subject, &broker, 1).await;
    subject.pass(waits[0]).await;
    assert_eq!(ids(&fetch(subject, &broker, 1).await), ["1"]);
    subject.pass(waits[1] / 2).await;
    nothing(subject, &broker).await;
    subject.pass(waits[1] / 2).await;
    assert_eq!(fetch(subject, &broker, 1).await[0].delivered, 3);
}

async fn max_deliver(subject: &impl Subject) {
    let broker = with_consumer(subject, ConsumerConfig { max_deliver: Some(2), ..subject.consumer() }).await;
    capture_advisories(&broker).await;
    publish(&broker, &[("s.a", "1"), ("s.a", "2")]).await;
    let got = fetch(subject, &broker, 2).await;
    settle(&broker, &got[1..], &Settlement::Ack).await;
    subject.pass_ack_wait().await;
    assert_eq!(ids(&fetch(subject, &broker, 1).await), ["1"]);
    subject.pass_ack_wait().await;
    nothing(subject, &broker).await;
    let told = advisories(subject, &broker, 1).await;
    assert_eq!((told.len(), &told[0]["stream_seq"], &told[0]["deliveries"]), (1, &1.into(), &2.into()));
    let info = broker.consumer_info("S", "c").await.expect("info");
    assert_eq!((info.pending, info.ack_pending), (0, 0));
}

async fn max_ack_pending(subject: &impl Subject) {
    let broker = with_consumer(subject, ConsumerConfig { max_ack_pending: 2, ..subject.consumer() }).await;
    publish(&broker, &[("s.a", "1"), ("s.a", "2"), ("s.a", "3")]).await;
    let got = fetch(subject, &broker, 2).await;
    assert_eq!(ids(&got), ["1", "2"]);
    nothing(subject, &broker).await;
    settle(&broker, &got[..1], &Settlement::Ack).await;
    assert_eq!(ids(&fetch(subject, &broker, 1).await), ["3"]);
}

async fn deliver_policies<T: Subject>(subject: &T) {
    let broker = with_stream(subject, stream()).await;
    publish(&broker, &[("s.a", "1"), ("s.a", "2"), ("s.a", "3")]).await;
    let cases = [
        ("all", DeliverPolicy::All, vec!["1", "2", "3", "4"]),
        ("new", DeliverPolicy::New, vec!["4"]),
        ("from", DeliverPolicy::FromSequence(2), vec!["2", "3", "4"]),
    ];
    for (durable, deliver, _) in &cases {
        let config = ConsumerConfig { durable: (*durable).into(), deliver: *deliver, ..subject.consumer() };
        broker.ensure_consumer("S", &config).await.expect("a consumer");
    }
    publish(&broker, &[("s.a", "4")]).await;
    for (durable, _, expected) in &cases {
        let got = fetch_from::<T>(&broker, durable, expected.len()).await;
        assert_eq!(ids(&got), *expected, "{durable}");
    }
}

async fn limits(subject: &impl Subject) {
    let broker = with_stream(subject, StreamConfig { max_messages: Some(2), ..stream() }).await;
    publish(&broker, &[("s.a", "1"), ("s.a", "2")]).await;
    let refused = broker.publish(vec![message("s.a", "3")]).await.remove(0);
    assert!(matches!(refused, Err(PublishError::StreamFull(_))), "{refused:?}");
    let info = broker.stream_info("S").await.expect("info");
    assert_eq!((info.messages, info.last_sequence), (2, 2), "nothing is dropped silently");

    let old = StreamConfig { max_messages: Some(2), discard: Discard::Old, ..stream() };
    let broker = with_stream(subject, old).await;
    publish(&broker, &[("s.a", "1"), ("s.a", "2"), ("s.a", "3")]).await;
    let info = broker.stream_info("S").await.expect("info");
    assert_eq!((info.messages, info.first_sequence, info.last_sequence), (2, 2, 3));
    assert!(broker.get("S", 1).await.expect("a look").is_none());

    let bytes = StreamConfig { max_bytes: Some(1000), ..stream() };
    let broker = with_stream(subject, bytes).await;
    let large = Message { payload: Bytes::from(vec![b'x'; 600]), ..message("s.a", "1") };
    assert!(broker.publish(vec![large]).await.remove(0).is_ok());
    let large = Message { payload: Bytes::from(vec![b'x'; 600]), ..message("s.a", "2") };
    assert!(matches!(broker.publish(vec![large]).await.remove(0), Err(PublishError::StreamFull(_))));
}

async fn last_per_subject(subject: &impl Subject) {
    let broker = with_stream(subject, stream().last_per_subject()).await;
    publish(&broker, &[("s.a", "1"), ("s.b", "2"), ("s.a", "3"), ("s.a", "4")]).await;
    broker.ensure_consumer("S", &subject.consumer()).await.expect("a consumer");
    let got = fetch(subject, &broker, 2).await;
    assert_eq!(ids(&got), ["2", "4"]);
    assert_eq!(broker.stream_info("S").await.expect("info").messages, 2);
}

async fn max_age(subject: &impl Subject) {
    let age = subject.time(60);
    let config = StreamConfig { max_age: Some(age), duplicate_window: age, ..stream() };
    let broker = with_stream(subject, config).await;
    broker.ensure_consumer("S", &subject.consumer()).await.expect("a consumer");
    publish(&broker, &[("s.a", "1")]).await;
    subject.pass(age / 2).await;
    publish(&broker, &[("s.a", "2")]).await;
    subject.pass(age * 3 / 4).await;
    let info = broker.stream_info("S").await.expect("info");
    assert_eq!((info.messages, info.first_sequence, info.last_sequence), (1, 2, 2));
    assert_eq!(ids(&fetch(subject, &broker, 1).await), ["2"]);
}

async fn info<T: Subject>(subject: &T) {
    let broker = with_consumer(subject, subject.consumer()).await;
    let empty = broker.stream_info("S").await.expect("info");
    assert_eq!((empty.messages, empty.first_sequence, empty.last_sequence), (0, 1, 0));
    assert!(!empty.incarnation.is_empty());
    publish(&broker, &[("s.a", "1"), ("s.a", "2"), ("s.a", "3"), ("s.a", "4")]).await;
    assert_eq!(broker.consumer_info("S", "c").await.expect("info").pending, 4);
    let got = fetch(subject, &broker, 3).await;
    settle(&broker, &[got[0].clone(), got[2].clone()], &Settlement::Ack).await;
    // Settlements are not answered, so they take effect in their own time.
    subject.pass(T::SOON).await;
    let info = broker.consumer_info("S", "c").await.expect("info");
    assert_eq!((info.pending, info.ack_pending, info.ack_floor, info.delivered), (1, 1, 1, 3));
    subject.pass_ack_wait().await;
    let next = fetch(subject, &broker, 2).await;
    assert_eq!(next.iter().map(|d| d.delivered).max(), Some(2));
    assert_eq!(broker.consumer_info("S", "c").await.expect("info").redelivered, 1);
}

async fn competing(subject: &impl Subject) {
    let broker = with_consumer(subject, subject.consumer()).await;
    let many: Vec<Message> = (0..100).map(|i| message("s.a", &i.to_string())).collect();
    broker.publish(many).await;
    let (a, b, c) =
        tokio::join!(fetch(subject, &broker, 30), fetch(subject, &broker, 30), fetch(subject, &broker, 30));
    let rest = fetch(subject, &broker, 10).await;
    let all: Vec<String> = [a, b, c, rest].iter().flat_map(|d| ids(d)).collect();
    let distinct: BTreeSet<&String> = all.iter().collect();
    assert_eq!((all.len(), distinct.len()), (100, 100));
}

async fn fetch_waits(subject: &impl Subject) {
    let broker = with_consumer(subject, subject.consumer()).await;
    let waiting = broker.fetch("S", "c", 10, subject.time(20));
    let publishing = async {
        subject.pass(subject.time(3)).await;
        publish(&broker, &[("s.a", "1")]).await;
    };
    let (got, ()) = tokio::join!(waiting, publishing);
    assert_eq!(ids(&got.expect("a fetch")), ["1"]);
    // Who stops waiting takes nothing along.
    drop(tokio::time::timeout(Duration::ZERO, broker.fetch("S", "c", 10, subject.time(20))).await);
    publish(&broker, &[("s.a", "2")]).await;
    assert_eq!(ids(&fetch(subject, &broker, 1).await), ["2"]);
}

async fn bad_configuration(subject: &impl Subject) {
    let broker = with_stream(subject, stream()).await;
    let overlapping = broker.ensure_stream(&StreamConfig::new("T", &["s.a.*"])).await;
    assert!(matches!(overlapping, Err(BrokerError::Config(_))), "{overlapping:?}");
    let too_many = ConsumerConfig {
        max_deliver: Some(1),
        backoff: vec![subject.time(6), subject.time(6)],
        ..subject.consumer()
    };
    let refused = broker.ensure_consumer("S", &too_many).await;
    assert!(matches!(refused, Err(BrokerError::Config(_))), "{refused:?}");
    let overlapping =
        ConsumerConfig { filter_subjects: vec!["s.a.>".into(), "s.*.x".into()], ..subject.consumer() };
    let refused = broker.ensure_consumer("S", &overlapping).await;
    assert!(matches!(refused, Err(BrokerError::Config(_))), "{refused:?}");
    assert!(matches!(broker.ensure_consumer("T", &subject.consumer()).await, Err(BrokerError::NoStream(_))));
    // Twice the same is no error.
    broker.ensure_stream(&stream()).await.expect("idempotent");
}

async fn consumer_changes(subject: &impl Subject) {
    let broker = with_consumer(subject, subject.consumer()).await;
    publish(&broker, &[("s.a", "1"), ("s.a", "2"), ("s.b", "3")]).await;
    let got = fetch(subject, &broker, 1).await;
    settle(&broker, &got, &Settlement::Ack).await;
    let wider = ConsumerConfig { ack_wait: subject.ack_wait() * 2, ..subject.consumer() };
    broker.ensure_consumer("S", &wider).await.expect("a change");
    assert_eq!(broker.consumer_info("S", "c").await.expect("info").pending, 2);
    assert_eq!(ids(&fetch(subject, &broker, 2).await), ["2", "3"]);
}

async fn find(subject: &impl Subject) {
    let broker = with_stream(subject, stream()).await;
    publish(&broker, &[("s.a.1", "1"), ("s.b.1", "2"), ("s.a.2", "3"), ("s.b.1", "4")]).await;
    let found = async |filter: &str, which| {
        broker.find("S", filter, which).await.expect("an answer").map(|m| m.sequence)
    };
    assert_eq!(found("s.a.>", Find::From(1)).await, Some(1));
    assert_eq!(found("s.a.>", Find::From(2)).await, Some(3));
    assert_eq!(found("s.a.>", Find::From(4)).await, None);
    assert_eq!(found("s.*.1", Find::Last).await, Some(4));
    assert_eq!(found("s.a.>", Find::Last).await, Some(3));
    assert_eq!(found("s.c", Find::Last).await, None);
    assert!(matches!(broker.find("T", "s.a", Find::Last).await, Err(BrokerError::NoStream(_))));
}

async fn list(subject: &impl Subject) {
    let broker = with_stream(subject, stream()).await;
    assert!(broker.consumers("S").await.expect("a list").is_empty());
    let one = ConsumerConfig { filter_subjects: vec!["s.a".into()], ..subject.consumer() };
    broker.ensure_consumer("S", &one).await.expect("a consumer");
    let two = ConsumerConfig::new("d", vec!["s.b".into(), "s.a".into()]);
    broker.ensure_consumer("S", &two).await.expect("a consumer");
    publish(&broker, &[("s.a", "1")]).await;
    fetch(subject, &broker, 1).await;
    let mut all = broker.consumers("S").await.expect("a list");
    all.sort_by(|a, b| a.durable.cmp(&b.durable));
    all[1].filters.sort();
    let shown: Vec<_> = all.iter().map(|c| (c.durable.as_str(), c.filters.join(" "), c.pending)).collect();
    assert_eq!(shown, [("c", "s.a".to_owned(), 0), ("d", "s.a s.b".to_owned(), 1)]);
    assert!(all[0].last_delivered_at.is_some() && all[1].last_delivered_at.is_none());
    assert!(matches!(broker.consumers("T").await, Err(BrokerError::NoStream(_))));
}

/// v1 → v1+v2 → v2, with events that came in one version or in both.
async fn narrower<T: Subject>(subject: &T) {
    let broker = with_stream(subject, stream()).await;
    let of = |filters: &[&str]| ConsumerConfig {
        filter_subjects: filters.iter().map(|&f| f.to_owned()).collect(),
        ..subject.consumer()
    };
    let event = |version: u32, id: &str, siblings: &str| {
        let mut event = message(&format!("s.a.v{version}.x"), &format!("{id}:{version}"));
        if !siblings.is_empty() {
            event.headers.push(("ce-siblings".to_owned(), siblings.to_owned()));
        }
        event
    };
    let refused = async |config: &ConsumerConfig| match broker.ensure_consumer("S", config).await {
        Err(BrokerError::PassesOver { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    let (old, both, new) = (of(&["s.a.v1.>"]), of(&["s.a.v1.>", "s.a.v2.>"]), of(&["s.a.v2.>"]));
    broker.ensure_consumer("S", &old).await.expect("a consumer");
    broker.publish(vec![event(1, "a", "")]).await;
    assert!(refused(&new).await.contains("s.a.v1.x"), "it is not settled");
    let got = fetch(subject, &broker, 1).await;
    settle(&broker, &got, &Settlement::Ack).await;
    subject.pass(T::SOON).await;
    assert!(
        refused(&new).await.contains("this version alone"),
        "nothing is pending, but the next will come as v1"
    );
    broker.ensure_consumer("S", &both).await.expect("wider");
    broker.publish(vec![event(2, "b", "1,2"), event(1, "b", "1,2")]).await;
    // Version 1 of the second is pending, but version 2 stands for it.
    broker.ensure_consumer("S", &new).await.expect("narrower");
    let filters = broker.consumer_info("S", "c").await.expect("info").filters;
    assert_eq!(filters, ["s.a.v2.>"]);
    assert_eq!(ids(&fetch(subject, &broker, 1).await), ["b:2"]);
}

/// A sibling may have been acknowledged for its sake, so that it has to come again.
async fn left_out(subject: &impl Subject) {
    let broker = with_stream(subject, stream()).await;
    let of = |filters: &[&str]| ConsumerConfig {
        filter_subjects: filters.iter().map(|&f| f.to_owned()).collect(),
        ..subject.consumer()
    };
    broker.ensure_consumer("S", &of(&["s.a.v1.>", "s.a.v2.>"])).await.expect("a consumer");
    let mut event = message("s.a.v2.x", "2");
    event.headers.push(("ce-siblings".to_owned(), "2,1".to_owned()));
    broker.publish(vec![event, message("s.a.v1.x", "1")]).await;
    let got = fetch(subject, &broker, 2).await;
    assert_eq!(ids(&got), ["2", "1"]);
    settle(&broker, &got[1..], &Settlement::Ack).await;
    broker.ensure_consumer("S", &of(&["s.a.v1.>"])).await.expect("narrower");
    subject.pass_ack_wait().await;
    assert_eq!(ids(&fetch(subject, &broker, 1).await), ["2"]);
}

async fn rewind(subject: &impl Subject) {
    let broker = with_consumer(subject, subject.consumer()).await;
    publish(&broker, &[("s.a", "1"), ("s.a", "2"), ("s.a", "3")]).await;
    let got = fetch(subject, &broker, 3).await;
    settle(&broker, &got, &Settlement::Ack).await;
    nothing(subject, &broker).await;
    broker.rewind_consumer("S", &subject.consumer(), 2).await.expect("rewound");
    let again = fetch(subject, &broker, 2).await;
    assert_eq!(ids(&again), ["2", "3"]);
    settle(&broker, &again, &Settlement::Ack).await;
    nothing(subject, &broker).await;
    // One that is not there is made.
    let other = ConsumerConfig { durable: "d".into(), ..subject.consumer() };
    broker.rewind_consumer("S", &other, 1).await.expect("made");
    assert_eq!(broker.consumer_info("S", "d").await.expect("info").pending, 3);
}

async fn restart<T: Subject>(subject: &T) {
    let broker = with_consumer(subject, subject.consumer()).await;
    let many: Vec<Message> = (0..300).map(|i| message("s.a", &i.to_string())).collect();
    broker.publish(many).await;
    let got = fetch(subject, &broker, 100).await;
    settle(&broker, &got[..50], &Settlement::Ack).await;
    // Settlements are not answered; a little later they are kept.
    subject.pass(T::SOON).await;
    let Some(broker) = subject.restart(broker).await else { return };
    let again = publish(&broker, &[("s.a", "7")]).await.remove(0);
    assert!(again.duplicate, "ids are remembered across a restart");
    let unsettled: BTreeSet<String> = (50..300).map(|i| i.to_string()).collect();
    let mut seen = BTreeSet::new();
    // What was settled just before may come again too: settlements are not answered.
    while !seen.is_superset(&unsettled) {
        let got = broker.fetch("S", "c", 100, subject.ack_wait() * 2).await.expect("a fetch");
        seen.extend(ids(&got));
        settle(&broker, &got, &Settlement::Ack).await;
        let missing: Vec<&String> = unsettled.difference(&seen).collect();
        let info = broker.consumer_info("S", "c").await.expect("info");
        assert!(!got.is_empty(), "everything unsettled comes again; missing: {missing:?}, {info:?}");
    }
    nothing(subject, &broker).await;
    let info = broker.stream_info("S").await.expect("info");
    assert_eq!((info.messages, info.last_sequence), (300, 300));
}
