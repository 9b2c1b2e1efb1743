//! The inventory service as a program of its own. `consign up` runs the same code beside the others.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    consign::process::main(
        inventory::NAME,
        |c: &mut inventory::Config| &mut c.http,
        inventory::Config::check,
        async |config, setup| {
            let db = inventory::open(setup.storage(), setup.clock).await?;
            Ok(inventory::service(&config, db, setup.broker).start().await?)
        },
    )
    .await
}
