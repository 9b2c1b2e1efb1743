//! The payment service as a program of its own. `consign up` runs the same code beside the others.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    consign::process::main(
        payment::NAME,
        |c: &mut payment::Config| &mut c.http,
        payment::Config::check,
        async |config, setup| {
            let db = payment::open(&setup.data_dir.join("payment.db"), setup.clock.clone()).await?;
            let ledger = setup.data_dir.join("gateway.db");
            let gateway =
                payment::gateway::SimulatedGateway::open(&ledger, config.gateway, setup.clock).await?;
            Ok(payment::service(&config, db, setup.broker, gateway).start().await?)
        },
    )
    .await
}
