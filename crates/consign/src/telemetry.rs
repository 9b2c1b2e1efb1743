//! Logs and metrics. Logs are readable on a terminal and JSON elsewhere, and optionally go to a file too; messages for people, fields for
//! queries; never payloads or secrets.

use std::any::Any;
use std::error::Error;
use std::fs::OpenOptions;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing_subscriber::filter::{ParseError, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

/// What is logged, and where to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// A filter in the syntax of `tracing_subscriber::filter::Targets`, for example `info,order=debug`.
    pub filter: String,
    /// How it is written to standard error.
    pub format: LogFormat,
    /// Also append JSON lines to this file.
    pub file: Option<PathBuf>,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { filter: "info".into(), format: LogFormat::Auto, file: None }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// `pretty` on a terminal, `json` elsewhere.
    #[default]
    Auto,
    /// For people.
    Pretty,
    /// One JSON object a line.
    Json,
}

/// Logging could not be set up.
#[derive(Debug, Error)]
pub enum TelemetryError {
    /// The filter cannot be read.
    #[error("log.filter `{filter}` is not a valid filter; for example: info,order=debug")]
    Filter {
        /// What was given.
        filter: String,
        #[source]
        /// What is wrong with it.
        source: ParseError,
    },
    /// The file cannot be opened.
    #[error("log.file {} cannot be opened for appending", path.display())]
    File {
        /// The path.
        path: PathBuf,
        #[source]
        /// Why.
        source: io::Error,
    },
}

impl LogConfig {
    /// The filter, or what is wrong with it.
    pub fn parse_filter(&self) -> Result<Targets, TelemetryError> {
        self.filter.parse().map_err(|source| TelemetryError::Filter { filter: self.filter.clone(), source })
    }
}

/// Starts logging for the process; the second call does nothing.
pub fn init_logs(config: &LogConfig) -> Result<(), TelemetryError> {
    let filter = config.parse_filter()?;
    let terminal = io::stderr().is_terminal();
    let pretty = match config.format {
        LogFormat::Auto => terminal,
        LogFormat::Pretty => true,
        LogFormat::Json => false,
    };
    let stderr = if pretty {
        fmt::layer().with_writer(io::stderr).with_ansi(terminal).with_target(false).boxed()
    } else {
        fmt::layer().json().flatten_event(true).with_writer(io::stderr).boxed()
    };
    let file = match &config.file {
        Some(path) => {
            let file = OpenOptions::new().create(true).append(true).open(path);
            let file = file.map_err(|source| TelemetryError::File { path: path.clone(), source })?;
            Some(fmt::layer().json().flatten_event(true).with_writer(Arc::new(file)).boxed())
        }
        None => None,
    };
    let _ = tracing_subscriber::registry().with(filter).with(stderr).with(file).try_init();
    Ok(())
}

/// The process's metrics, to be rendered for Prometheus; installed on first use.
pub fn metrics() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        const SECONDS: [f64; 14] =
            [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
        let builder = PrometheusBuilder::new();
        // Refused only for an empty list of buckets, which this is not.
        let builder = builder
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)
            .unwrap_or_else(|_| PrometheusBuilder::new());
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        let _ = metrics::set_global_recorder(recorder);
        describe();
        handle
    })
}

fn describe() {
    use metrics::{describe_counter as counter, describe_gauge as gauge, describe_histogram as histogram};
    counter!("consign_events_published_total", "Events acknowledged by the broker.");
    counter!(
        "consign_events_handled_total",
        "Events by consumer and outcome: handled, duplicate, retried, dead_lettered, redriven."
    );
    counter!(
        "consign_events_republished_total",
        "Events that a stream had lost, published again from the outbox."
    );
    counter!("consign_consumers_rewound_total", "Consumers that stood ahead of their stream and began anew.");
    counter!(
        "consign_nats_events_total",
        "What happened to the connection: connected, disconnected, lame_duck, slow_consumer, …"
    );
    counter!("consign_nats_permission_errors_total", "What NATS refused for want of a right.");
    counter!("consign_tasks_total", "Runs of tasks by kind and outcome.");
    counter!("consign_http_requests_total", "HTTP requests by route, method and status.");
    histogram!("consign_http_request_seconds", "Seconds from request to response.");
    histogram!("consign_handler_seconds", "Seconds a handler took, by consumer and outcome.");
    gauge!("consign_consumer_lag", "Events not yet delivered to the consumer.");
    gauge!("consign_consumer_ack_pending", "Events delivered and not settled.");
    gauge!(
        "consign_consumer_unsettled_span",
        "Sequences between the consumer's ack floor and its last delivery."
    );
    gauge!("consign_outbox_pending", "Events recorded and not acknowledged by the broker.");
    gauge!("consign_outbox_oldest_seconds", "Age of the oldest such event.");
    gauge!("consign_tasks_due", "Tasks that could run now.");
    gauge!("consign_dead_letters_open", "Dead letters that wait for a decision.");
    gauge!("consign_broker_connected", "1 if the broker can be published to.");
}

/// An error and its causes in one line, each said once.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        let next = e.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        source = e.source();
    }
    text
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
