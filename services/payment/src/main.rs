//! The payment service as a program of its own. `consign up` runs the same code beside the others.

use std::process::ExitCode;

use payment::Outside;

#[tokio::main]
async fn main() -> ExitCode {
    consign::process::main(
        payment::NAME,
        |c: &mut payment::Config| &mut c.http,
        payment::Config::check,
        async |config, setup| {
            let db = payment::open(setup.storage(), setup.clock.clone()).await?;
            let ledger = setup.storage_of("gateway");
            let outside = Outside::open(&config.gateway, ledger, setup.clock).await?;
            Ok(payment::service(&config, db, setup.broker, outside).start().await?)
        },
    )
    .await
}
