//! The payment service as a program of its own. `consign up` runs the same code beside the others.

use std::process::ExitCode;

use payment::gateway::SimulatedGateway;

#[tokio::main]
async fn main() -> ExitCode {
    consign::process::main(
        payment::NAME,
        |c: &mut payment::Config| &mut c.http,
        payment::Config::check,
        async |config, setup| {
            let db = payment::open(setup.storage(), setup.clock.clone()).await?;
            // The outside world: it has a ledger of its own.
            let ledger = setup.storage_of("gateway");
            let gateway = SimulatedGateway::open(ledger, config.gateway, setup.clock).await?;
            Ok(payment::service(&config, db, setup.broker, gateway).start().await?)
        },
    )
    .await
}
