//! The order service as a program of its own. `consign up` runs the same code beside the others.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    consign::process::main(
        order::NAME,
        |c: &mut order::Config| &mut c.http,
        order::Config::check,
        async |config, setup| {
            let db = order::open(setup.storage(), setup.clock).await?;
            Ok(order::service(&config, db, setup.broker).start().await?)
        },
    )
    .await
}
