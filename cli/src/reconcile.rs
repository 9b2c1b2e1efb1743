//! `consign reconcile`: has each service compare its outbox with the streams, over its admin endpoint.

use comfy_table::Table;
use consign::handler::BoxError;
use consign::reconcile::Report;
use serde_json::json;

use crate::client::Client;
use crate::output::Format;

pub async fn run(services: &[(&'static str, Client); 3], format: Format) -> Result<(), BoxError> {
    let mut reports = Vec::new();
    for (service, client) in services {
        let report: Report = client.post("/admin/reconcile", &json!({})).await?;
        reports.push((*service, report));
    }
    if format == Format::Json {
        outln!("{}", serde_json::to_string_pretty(&reports)?);
        return Ok(());
    }
    let mut table = Table::new();
    table.set_header(["service", "stream", "compared", "present", "aged out", "published again"]);
    for (service, report) in &reports {
        for s in &report.streams {
            let numbers = [s.compared, s.present, s.aged_out, s.republished].map(|n| n.to_string());
            let [compared, present, aged_out, republished] = numbers;
            table.add_row([
                (*service).to_owned(),
                s.stream.clone(),
                compared,
                present,
                aged_out,
                republished,
            ]);
        }
    }
    outln!("{table}");
    for (service, report) in &reports {
        for durable in &report.rewound {
            outln!("{service}: {durable} stood ahead of its stream and begins anew");
        }
    }
    Ok(())
}
