//! NATS subjects: dot-separated tokens; in a filter `*` stands for one token and a last `>` for one or more.

/// Whether a message can be published to it: non-empty tokens, no wildcards, no white space.
pub fn is_valid_subject(subject: &str) -> bool {
    is_valid_filter(subject) && !subject.split('.').any(|t| t == "*" || t == ">")
}

/// Whether it can be a filter: as a subject, but with wildcards, `>` only at the end.
pub fn is_valid_filter(filter: &str) -> bool {
    let count = filter.split('.').count();
    !filter.is_empty()
        && filter.len() <= 512
        && filter.split('.').enumerate().all(|(i, t)| {
            !t.is_empty()
                && !t.contains(|c: char| c.is_whitespace() || c.is_control())
                && (t != ">" || i + 1 == count)
        })
}

/// Whether the filter matches the subject.
pub fn matches(filter: &str, subject: &str) -> bool {
    let mut tokens = subject.split('.');
    for f in filter.split('.') {
        match (f, tokens.next()) {
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (f, Some(t)) if f == t => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

/// Whether everything that `narrow` matches is matched by `wide` too.
pub(super) fn covers(wide: &str, narrow: &str) -> bool {
    let mut tokens = narrow.split('.');
    for w in wide.split('.') {
        match (w, tokens.next()) {
            (">", Some(_)) => return true,
            ("*", Some(n)) if n != ">" => {}
            (w, Some(n)) if w == n => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

/// Whether some subject is matched by both filters.
pub fn overlap(a: &str, b: &str) -> bool {
    let (mut a, mut b) = (a.split('.'), b.split('.'));
    loop {
        match (a.next(), b.next()) {
            (None, None) | (Some(">"), Some(_)) | (Some(_), Some(">")) => return true,
            (Some(x), Some(y)) if x == y || x == "*" || y == "*" => {}
            _ => return false,
        }
    }
}

/// The event type, version and rest of a subject or filter as events have them: `orders.created.v1.standard`.
pub(crate) fn versioned(subject: &str) -> Option<(&str, u32, &str)> {
    let mut at = 0;
    for token in subject.split('.') {
        let end = at + token.len();
        if let Some(version) = token.strip_prefix('v').and_then(|n| n.parse().ok())
            && at > 0
        {
            return Some((&subject[..at - 1], version, &subject[end..]));
        }
        at = end + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_in_subjects() {
        assert_eq!(versioned("orders.created.v12.standard.k"), Some(("orders.created", 12, ".standard.k")));
        assert_eq!(versioned("orders.created.v1"), Some(("orders.created", 1, "")));
        assert_eq!(versioned("v1.orders"), None);
        assert_eq!(versioned("orders.>"), None);
    }

    #[test]
    fn wildcards() {
        assert!(matches("orders.>", "orders.created.v1"));
        assert!(matches("orders.*.v1", "orders.created.v1"));
        assert!(matches("orders.created", "orders.created"));
        assert!(!matches("orders.>", "orders"));
        assert!(!matches("orders.*", "orders.created.v1"));
        assert!(!matches("orders.created.v1", "orders.created"));
    }

    #[test]
    fn overlaps() {
        assert!(overlap("orders.>", "orders.created.*"));
        assert!(overlap("*.created", "orders.*"));
        assert!(!overlap("orders.>", "orders"));
        assert!(!overlap("orders.created", "orders.cancelled"));
    }

    #[test]
    fn validity() {
        for bad in ["", ".", "a..b", "a b", "a.>.b", "a.\n"] {
            assert!(!is_valid_filter(bad), "{bad:?}");
        }
        assert!(is_valid_filter("a.*.>"));
        assert!(!is_valid_subject("a.*"));
    }
}
