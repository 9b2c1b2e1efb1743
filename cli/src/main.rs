//! See the library beside this file.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    consign_cli::main().await
}
