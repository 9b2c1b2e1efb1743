//! How large a document may be and what no database keeps, looked at before it is parsed: what is hostile costs no more than a look at its bytes.

use thiserror::Error;

/// An event's payload has at most so many bytes. Half of what a NATS server takes by default (`max_payload`), so that it fits with its headers.
pub const MAX_BYTES: usize = 512 * 1024;
/// Lists and objects may be nested so deep.
pub const MAX_DEPTH: usize = 32;
/// A document has at most so many values, those in lists and objects included.
pub const MAX_VALUES: usize = 100_000;

/// A document is larger than any event may be, or cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum OutOfBounds {
    /// Too many bytes.
    #[error("it has {0} bytes; {MAX_BYTES} are allowed")]
    Bytes(usize),
    /// Too deep.
    #[error("it is nested deeper than {MAX_DEPTH} levels")]
    Depth,
    /// Too many values.
    #[error("it has more than {MAX_VALUES} values")]
    Values,
    /// A text with the character U+0000, which PostgreSQL keeps neither as text nor in `jsonb`
    /// (<https://www.postgresql.org/docs/current/datatype-json.html>). One such value would fail the transaction of all that share it.
    #[error("it contains the character U+0000, which cannot be stored; leave it out")]
    Nul,
}

/// Whether a text of JSON is within bounds. It need not be valid: that is the parser's to say.
///
/// # Errors
/// The first bound that it exceeds.
pub fn check(json: &[u8]) -> Result<(), OutOfBounds> {
    if json.len() > MAX_BYTES {
        return Err(OutOfBounds::Bytes(json.len()));
    }
    let (mut depth, mut values) = (0_usize, 0_usize);
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => {
                while let Some(byte) = bytes.next() {
                    match byte {
                        b'"' => break,
                        b'\\' if bytes.as_slice().starts_with(b"u0000") => return Err(OutOfBounds::Nul),
                        b'\\' => drop(bytes.next()),
                        _ => {}
                    }
                }
            }
            b'[' | b'{' => {
                (depth, values) = (depth + 1, values + 1);
                if depth > MAX_DEPTH {
                    return Err(OutOfBounds::Depth);
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            // Each stands before one more value.
            b',' => values += 1,
            _ => {}
        }
        if values > MAX_VALUES {
            return Err(OutOfBounds::Values);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    #[test]
    fn each_bound_is_named() {
        assert_eq!(check(&vec![b' '; MAX_BYTES + 1]), Err(OutOfBounds::Bytes(MAX_BYTES + 1)));
        let nested = |n: usize| "[".repeat(n) + &"]".repeat(n);
        assert_eq!(check(nested(MAX_DEPTH).as_bytes()), Ok(()));
        assert_eq!(check(nested(MAX_DEPTH + 1).as_bytes()), Err(OutOfBounds::Depth));
        assert_eq!(check("[],".repeat(MAX_VALUES).as_bytes()), Err(OutOfBounds::Values));
        for nul in [json!("\u{0}"), json!({"a\u{0}": [1]}), json!(["a\\\u{0}"])] {
            assert_eq!(check(nul.to_string().as_bytes()), Err(OutOfBounds::Nul), "{nul}");
        }
        assert_eq!(
            check(json!("\\u0000").to_string().as_bytes()),
            Ok(()),
            "a backslash, and what looks like it"
        );
        // Brackets in texts are not levels.
        assert_eq!(check(json!("[\"{".repeat(100)).to_string().as_bytes()), Ok(()));
    }

    fn depth(v: &Value) -> usize {
        match v {
            Value::Array(all) => 1 + all.iter().map(depth).max().unwrap_or(0),
            Value::Object(all) => 1 + all.values().map(depth).max().unwrap_or(0),
            _ => 0,
        }
    }

    fn has_nul(v: &Value) -> bool {
        match v {
            Value::String(text) => text.contains('\0'),
            Value::Array(all) => all.iter().any(has_nul),
            Value::Object(all) => all.iter().any(|(name, v)| name.contains('\0') || has_nul(v)),
            _ => false,
        }
    }

    fn documents() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".*".prop_map(Value::from),
            "[a\\\\u0\u{0}]{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(48, 96, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                prop::collection::btree_map(".*", inner, 0..3)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// What is valid JSON is let through if and only if it is no deeper than allowed, and can be kept.
        #[test]
        fn valid_documents_are_judged_by_their_depth_and_texts(document in documents()) {
            let allowed = depth(&document) <= MAX_DEPTH && !has_nul(&document);
            prop_assert_eq!(check(document.to_string().as_bytes()).is_ok(), allowed);
        }

        #[test]
        fn anything_gets_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            let _ = check(&bytes);
        }
    }
}
