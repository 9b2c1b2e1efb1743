//! How results are printed: tables for people, JSON for scripts.

use std::borrow::Cow;
use std::fmt;
use std::io::{ErrorKind, Write};

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

/// `print!` for what a command was asked for. When its reader has gone (`consign … | head`), there is nobody to go on for, and the command ends.
macro_rules! out {
    ($($text:tt)*) => { $crate::output::print(format_args!($($text)*)) };
}

/// The same for `println!`.
macro_rules! outln {
    ($($text:tt)*) => { $crate::output::print(format_args!("{}\n", format_args!($($text)*))) };
}

/// As of a program that SIGPIPE ends (128 + 13), which Rust's runtime ignores.
const READER_GONE: i32 = 141;

/// See `out!`.
pub fn print(text: fmt::Arguments<'_>) {
    let mut stdout = std::io::stdout().lock();
    if let Err(error) = stdout.write_fmt(text).and_then(|()| stdout.flush()) {
        if error.kind() == ErrorKind::BrokenPipe {
            std::process::exit(READER_GONE);
        }
        eprintln!("consign: the result cannot be written: {error}");
        std::process::exit(2);
    }
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// For scripts.
    Json,
}

/// A value as it stands in a table.
pub fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

/// How far something is, on terminals only.
pub fn bar(len: u64, message: impl Into<Cow<'static, str>>) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:<10} {bar:40} {pos}/{len} {per_sec} eta {eta}");
    let bar = ProgressBar::new(len).with_message(message);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
