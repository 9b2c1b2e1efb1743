//! The connection to NATS, and what is made there: on real servers.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::fs;
use std::time::{Duration, Instant};

use bytes::Bytes;
use consign::broker::nats::{Drift, NatsBroker, NatsConfig, Provision, TlsConfig};
use consign::broker::{Broker, BrokerError, ConsumerConfig, Message, PublishError, Settlement, StreamConfig};
use consign::telemetry::chain;
use consign::testing::servers::{NATS, NatsServer};

fn server(configuration: &str) -> NatsServer {
    tokio::task::block_in_place(|| NatsServer::start_with(NATS, configuration))
}

fn message(subject: &str, id: &str) -> Message {
    Message {
        subject: subject.into(),
        msg_id: Some(id.into()),
        headers: Vec::new(),
        payload: Bytes::from("x"),
    }
}

async fn works(config: &NatsConfig) -> NatsBroker {
    let broker = NatsBroker::connect(config, "test").await.unwrap();
    broker.ensure_stream(&StreamConfig::new("S", &["s.>"])).await.unwrap();
    broker.ensure_consumer("S", &ConsumerConfig::new("c", Vec::new())).await.unwrap();
    broker.publish(vec![message("s.a", "1")]).await.remove(0).unwrap();
    let got = broker.fetch("S", "c", 1, Duration::from_secs(5)).await.unwrap();
    assert_eq!(got.len(), 1);
    broker.settle("S", "c", vec![(got[0].reply.clone(), Settlement::Ack)]).await.unwrap();
    broker
}

async fn refused(config: &NatsConfig) -> String {
    let config = NatsConfig { connect_limit: Duration::from_secs(1), ..config.clone() };
    let error = NatsBroker::connect(&config, "test").await.err().expect("must be refused");
    chain(&error)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_connection_is_given_up_after_its_limit() {
    let config = NatsConfig {
        urls: vec!["nats://127.0.0.1:1".into()],
        connect_limit: Duration::from_secs(2),
        ..NatsConfig::default()
    };
    let started = Instant::now();
    let error = NatsBroker::connect(&config, "test").await.err().unwrap();
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
    let text = chain(&error);
    assert!(
        text.contains("nats://127.0.0.1:1") && text.contains("nats.urls") && text.contains("refused"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_comes_later_is_waited_for() {
    let mut late = server("");
    let config = late.config();
    late.kill();
    let connecting = tokio::spawn(async move { works(&config).await.status() });
    tokio::time::sleep(Duration::from_millis(700)).await;
    tokio::task::block_in_place(|| late.start_again());
    assert!(connecting.await.unwrap().connected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_is_made_again_and_nothing_is_published_meanwhile() {
    let mut nats = server("");
    let broker = works(&nats.config()).await;
    tokio::task::block_in_place(|| nats.kill());
    let until = async |connected: bool| {
        let started = Instant::now();
        while broker.status().connected != connected {
            assert!(started.elapsed() < Duration::from_secs(30), "connected must become {connected}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    until(false).await;
    assert!(broker.status().detail.is_some());
    assert!(matches!(broker.stream_info("S").await, Err(BrokerError::Unavailable(_))));
    assert!(matches!(
        broker.fetch("S", "c", 1, Duration::from_secs(1)).await,
        Err(BrokerError::Unavailable(_))
    ));
    tokio::task::block_in_place(|| nats.start_again());
    until(true).await;
    let again = broker.publish(vec![message("s.a", "1")]).await.remove(0).unwrap();
    assert!(again.duplicate, "the same store");
    broker.publish(vec![message("s.a", "2")]).await.remove(0).unwrap();
    assert_eq!(broker.fetch("S", "c", 1, Duration::from_secs(5)).await.unwrap().len(), 1);
    broker.close(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_tokens_and_nkeys() {
    let nats = server("authorization { users: [{ user: app, password: \"s3cret\" }] }");
    let user =
        NatsConfig { user: Some("app".into()), password: Some("s3cret".to_owned().into()), ..nats.config() };
    works(&user).await;
    let wrong = NatsConfig { password: Some("wrong".to_owned().into()), ..user };
    let text = refused(&wrong).await;
    assert!(text.contains("authorization"), "{text}");
    assert!(!text.contains("wrong"), "a secret in an error: {text}");
    let shown = toml::to_string(&wrong).unwrap();
    assert!(!shown.contains("wrong") && shown.contains("(set)"), "{shown}");

    let nats = server("authorization { token: \"t0ken\" }");
    works(&NatsConfig { token: Some("t0ken".to_owned().into()), ..nats.config() }).await;
    refused(&nats.config()).await;

    // From the documentation of nkeys: a seed and its public key.
    let seed = "SUANQDPB2RUOE4ETUA26CNX7FUKE5ZZKFCQIIW63OX225F2CO7UEXTM7ZY";
    let public = nkeys::KeyPair::from_seed(seed).unwrap().public_key();
    let nats = server(&format!("authorization {{ users: [{{ nkey: {public} }}] }}"));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("seed");
    fs::write(&file, format!("{seed}\n")).unwrap();
    works(&NatsConfig { nkey: Some(file), ..nats.config() }).await;
    let missing = NatsConfig { nkey: Some(dir.path().join("nowhere")), ..nats.config() };
    let text = refused(&missing).await;
    assert!(text.contains("nats.nkey") && text.contains("nowhere"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_and_mutual_tls() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    fs::write(file("ca.pem"), &ca_pem).unwrap();
    for name in ["server", "client"] {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["127.0.0.1".into(), "localhost".into()]).unwrap();
        fs::write(file(&format!("{name}.pem")), params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
        fs::write(file(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }
    let path = |name: &str| file(name).display().to_string();
    let nats = server(&format!(
        "tls {{ cert_file: \"{}\", key_file: \"{}\", ca_file: \"{}\", verify: true }}",
        path("server.pem"),
        path("server.key"),
        path("ca.pem")
    ));
    let tls = TlsConfig {
        required: true,
        ca: Some(file("ca.pem")),
        cert: Some(file("client.pem")),
        key: Some(file("client.key")),
    };
    works(&NatsConfig { tls: tls.clone(), ..nats.config() }).await;
    refused(&NatsConfig { tls: TlsConfig { cert: None, key: None, ..tls.clone() }, ..nats.config() }).await;
    refused(&NatsConfig { tls: TlsConfig { ca: None, ..tls }, ..nats.config() }).await;
}

/// What a consuming service needs, and no more.
const LEAST: &str = r#"
authorization {
  users: [
    { user: admin, password: admin }
    { user: app, password: app, permissions: {
        publish: ["s.>", "$JS.API.CONSUMER.INFO.S.c", "$JS.API.CONSUMER.MSG.NEXT.S.c", "$JS.ACK.S.c.>"]
        subscribe: ["_INBOX_app.>"]
    } }
  ]
}"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_only_binds_needs_the_least_rights() {
    let nats = server(LEAST);
    let login = |name: &str| NatsConfig {
        user: Some(name.to_owned()),
        password: Some(name.to_owned().into()),
        timeout: Duration::from_secs(1),
        ..nats.config()
    };
    let admin = NatsBroker::connect(&login("admin"), "admin").await.unwrap();
    let bind =
        NatsConfig { provision: Provision::Bind, inbox_prefix: Some("_INBOX_app".into()), ..login("app") };
    let app = NatsBroker::connect(&bind, "app").await.unwrap();
    let (stream, consumer) = (StreamConfig::new("S", &["s.>"]), ConsumerConfig::new("c", Vec::new()));
    app.ensure_stream(&stream).await.expect("nothing to be made");
    let missing = app.ensure_consumer("S", &consumer).await;
    assert!(missing.is_err(), "what is not there cannot be bound to");
    admin.apply_stream(&stream).await.unwrap();
    admin.apply_consumer("S", &consumer).await.unwrap();
    app.ensure_consumer("S", &consumer).await.unwrap();
    app.publish(vec![message("s.a", "1")]).await.remove(0).unwrap();
    let got = app.fetch("S", "c", 1, Duration::from_secs(5)).await.unwrap();
    app.settle("S", "c", vec![(got[0].reply.clone(), Settlement::Ack)]).await.unwrap();
    let started = Instant::now();
    while admin.consumer_info("S", "c").await.unwrap().ack_floor != 1 {
        assert!(started.elapsed() < Duration::from_secs(5), "the acknowledgement counts");
    }
    // What it may not do fails in time, and the status says why.
    let forbidden = app.publish(vec![message("t.a", "1")]).await.remove(0);
    assert!(matches!(forbidden, Err(PublishError::Unknown(_) | PublishError::NoStream(_))), "{forbidden:?}");
    let detail = app.status().detail.unwrap_or_default();
    assert!(detail.to_lowercase().contains("permissions violation"), "{detail}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_declared_is_changed_in_place_or_refused() {
    let nats = server("");
    let broker = NatsBroker::connect(&nats.config(), "test").await.unwrap();
    let stream = StreamConfig::new("S", &["s.>"]);
    assert_eq!(broker.stream_drift(&stream).await.unwrap(), Drift::Missing);
    assert_eq!(broker.apply_stream(&stream).await.unwrap(), Drift::Missing);
    assert_eq!(broker.apply_stream(&stream).await.unwrap(), Drift::None);
    let longer = StreamConfig { max_messages: Some(10), ..stream.clone() };
    let Drift::Changed(differences) = broker.stream_drift(&longer).await.unwrap() else {
        panic!("must differ")
    };
    assert_eq!((differences.len(), differences[0].setting), (1, "max_msgs"));
    broker.apply_stream(&longer).await.unwrap();
    assert_eq!(broker.stream_drift(&longer).await.unwrap(), Drift::None);

    let wide = ConsumerConfig::new("c", vec!["s.a.>".into(), "s.b.>".into()]);
    assert_eq!(broker.apply_consumer("S", &wide).await.unwrap(), Drift::Missing);
    assert_eq!(broker.consumer_drift("S", &wide).await.unwrap(), Drift::None);
    broker.publish(vec![message("s.b.1", "1")]).await.remove(0).unwrap();
    // Narrowing it would pass over what is pending.
    let narrow = ConsumerConfig::new("c", vec!["s.a.>".into()]);
    let refused = broker.apply_consumer("S", &narrow).await;
    assert!(
        matches!(&refused, Err(BrokerError::PassesOver { what, .. }) if what.contains("s.b.1")),
        "{refused:?}"
    );
    let got = broker.fetch("S", "c", 1, Duration::from_secs(5)).await.unwrap();
    broker.settle("S", "c", vec![(got[0].reply.clone(), Settlement::Ack)]).await.unwrap();
    let started = Instant::now();
    while broker.apply_consumer("S", &narrow).await.is_err() {
        assert!(started.elapsed() < Duration::from_secs(5), "with all settled it may be narrowed");
    }
    assert_eq!(broker.consumer_drift("S", &narrow).await.unwrap(), Drift::None);
    // Widening is always possible, and so is more patience.
    let patient = ConsumerConfig { ack_wait: Duration::from_secs(60), ..wide };
    assert!(matches!(broker.apply_consumer("S", &patient).await.unwrap(), Drift::Changed(d) if d.len() == 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_gives_back_what_was_fetched_ahead() {
    let nats = server("");
    let broker = works(&nats.config()).await;
    let many = (10..60).map(|n| message("s.a", &n.to_string())).collect();
    broker.publish(many).await.into_iter().for_each(|a| drop(a.unwrap()));
    // More is asked for than is taken, so the rest arrives and waits.
    let first = broker.fetch("S", "c", 50, Duration::from_secs(5)).await.unwrap();
    let mut seen = first.len();
    broker
        .settle("S", "c", first.iter().map(|d| (d.reply.clone(), Settlement::Ack)).collect())
        .await
        .unwrap();
    broker.close(Duration::from_secs(5)).await;
    let other = NatsBroker::connect(&nats.config(), "other").await.unwrap();
    let started = Instant::now();
    while seen < 50 {
        assert!(started.elapsed() < Duration::from_secs(10), "well before AckWait: {seen} of 50");
        let got = other.fetch("S", "c", 50, Duration::from_secs(1)).await.unwrap();
        other
            .settle("S", "c", got.iter().map(|d| (d.reply.clone(), Settlement::Ack)).collect())
            .await
            .unwrap();
        seen += got.len();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_gives_back_what_was_fetched_ahead_while_more_and_more_comes() {
    const CONSUMERS: usize = 8;
    let nats = server("");
    let broker = NatsBroker::connect(&nats.config(), "leaves").await.unwrap();
    broker.ensure_stream(&StreamConfig::new("S", &["s.>"])).await.unwrap();
    let durable = |n: usize| format!("c{n}");
    for n in 0..CONSUMERS {
        broker.ensure_consumer("S", &ConsumerConfig::new(&durable(n), Vec::new())).await.unwrap();
        // One at least, and the request for the others stays open.
        broker.publish(vec![message("s.a", &format!("first {n}"))]).await.remove(0).unwrap();
        let got = broker.fetch("S", &durable(n), 256, Duration::from_secs(5)).await.unwrap();
        let acks = got.iter().map(|d| (d.reply.clone(), Settlement::Ack)).collect();
        broker.settle("S", &durable(n), acks).await.unwrap();
    }
    let other = NatsBroker::connect(&nats.config(), "stays").await.unwrap();
    let steady = async {
        for n in 0.. {
            other.publish(vec![message("s.a", &n.to_string())]).await.remove(0).unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = steady => {}
        () = broker.close(Duration::from_secs(4)) => {}
    }
    drop(broker);
    // Well before AckWait, which is 30 s.
    let all = other.stream_info("S").await.unwrap().messages;
    let deadline = Instant::now() + Duration::from_secs(15);
    for n in 0..CONSUMERS {
        while other.consumer_info("S", &durable(n)).await.unwrap().ack_floor < all {
            let got = other.fetch("S", &durable(n), 256, Duration::from_millis(500)).await.unwrap();
            let acks = got.iter().map(|d| (d.reply.clone(), Settlement::Ack)).collect();
            other.settle("S", &durable(n), acks).await.unwrap();
            let info = other.consumer_info("S", &durable(n)).await.unwrap();
            assert!(Instant::now() < deadline, "{n}: {info:?} of {all}");
        }
    }
}
