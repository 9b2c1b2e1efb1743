//! Whether a reader of one schema can read what a writer of another sends, and if not, why: each break in words.
//!
//! Between two versions of an event there are two questions. *Backward*: can consumers of the new version read what producers of the old one sent
//! (a replay, a consumer that moved first)? *Forward*: can consumers of the old version read what producers of the new one send (a producer that
//! moved first)? Both are the same question with the roles exchanged: is everything that the writer's schema allows allowed by the reader's?
//!
//! What is taken for granted: writers send no fields but those their schema names; readers ignore fields theirs does not name, unless it refuses
//! them (`additionalProperties: false`); alternatives of a `oneOf` exclude each other, as those of a Rust enum do.
//!
//! ```
//! use consign::schema::compat::{Compatibility, compare};
//! use serde_json::json;
//!
//! let old = json!({"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"]});
//! let new = json!({"type": "object", "properties": {"total": {"type": "integer"}, "note": {"type": "string"}}, "required": ["total"]});
//! assert_eq!(compare(&old, &new).compatibility(), Compatibility::Full);
//! ```

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;
use serde_json::{Map, Value};

use super::validate::Validator;

/// What a reader may stumble on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Break {
    /// Where: a JSON pointer (RFC 6901) into the event, `*` for each item of an array; empty for the whole.
    pub pointer: String,
    /// What the writer may send and the reader does not take.
    pub detail: String,
}

impl fmt::Display for Break {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pointer = if self.pointer.is_empty() { "/" } else { &self.pointer };
        write!(f, "{pointer}: {}", self.detail)
    }
}

/// In which directions two versions understand each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Compatibility {
    /// In both.
    Full,
    /// New consumers read old events, but old consumers do not read all new ones.
    Backward,
    /// Old consumers read new events, but new consumers do not read all old ones.
    Forward,
    /// In none.
    None,
}

impl Compatibility {
    /// The word for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Full => "fully compatible",
            Self::Backward => "backward compatible only",
            Self::Forward => "forward compatible only",
            Self::None => "incompatible",
        }
    }
}

/// How two versions of a schema get on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// What consumers of the new one stumble on in events of the old one.
    pub backward: Vec<Break>,
    /// What consumers of the old one stumble on in events of the new one.
    pub forward: Vec<Break>,
}

impl Comparison {
    /// In which directions there is no break.
    pub fn compatibility(&self) -> Compatibility {
        match (self.backward.is_empty(), self.forward.is_empty()) {
            (true, true) => Compatibility::Full,
            (true, false) => Compatibility::Backward,
            (false, true) => Compatibility::Forward,
            (false, false) => Compatibility::None,
        }
    }
}

/// Compares two versions of a schema.
pub fn compare(old: &Value, new: &Value) -> Comparison {
    Comparison { backward: reads(new, old), forward: reads(old, new) }
}

/// What a reader with one schema stumbles on in what a writer with the other sends.
pub fn reads(reader: &Value, writer: &Value) -> Vec<Break> {
    let mut reading = Reading { reader, writer, path: Vec::new(), seen: BTreeSet::new(), breaks: Vec::new() };
    reading.node(reader, writer);
    reading.breaks
}

/// What changed between two versions, in words; descriptions and other annotations are passed over.
pub fn changes(old: &Value, new: &Value) -> Vec<Break> {
    let mut changes = Changes { old, new, path: Vec::new(), found: Vec::new() };
    changes.node(old, new);
    changes.found
}

struct Changes<'a> {
    old: &'a Value,
    new: &'a Value,
    path: Vec<String>,
    found: Vec<Break>,
}

impl Changes<'_> {
    fn say(&mut self, step: Option<&str>, detail: String) {
        let steps = self.path.iter().map(String::as_str).chain(step);
        self.found.push(Break { pointer: pointer(steps), detail });
    }

    fn node(&mut self, old: &Value, new: &Value) {
        // Deeper than any event of ours; a type that refers to itself ends here.
        if self.path.len() > 16 {
            return;
        }
        let (Some(old), Some(new)) = (resolve(self.old, old), resolve(self.new, new)) else { return };
        let (Value::Object(o), Value::Object(n)) = (old, new) else {
            if old != new {
                self.say(None, format!("was {old}, is {new}"));
            }
            return;
        };
        for keyword in KEYWORDS {
            let (before, after) = (o.get(*keyword), n.get(*keyword));
            if before != after {
                let word = |v: Option<&Value>| v.map_or_else(|| "not set".to_owned(), Value::to_string);
                self.say(None, format!("{keyword} was {}, is {}", word(before), word(after)));
            }
        }
        if let (Some(before), Some(after)) = (o.get("items"), n.get("items")) {
            self.path.push("*".into());
            self.node(before, after);
            self.path.pop();
        }
        let empty = Map::new();
        let fields = |s: &Map<String, Value>| s.get("properties").and_then(Value::as_object).cloned();
        let (before, after) = (fields(o).unwrap_or_else(|| empty.clone()), fields(n).unwrap_or(empty));
        let (needed, needs) = (names(o, "required"), names(n, "required"));
        let kind = |required: bool| if required { "required" } else { "optional" };
        for name in before.keys().filter(|name| !after.contains_key(*name)) {
            self.say(Some(name), format!("removed; it was {}", kind(needed.contains(name))));
        }
        for (name, schema) in &after {
            let Some(was) = before.get(name) else {
                self.say(Some(name), format!("added, {}", kind(needs.contains(name))));
                continue;
            };
            if needed.contains(name) != needs.contains(name) {
                let (was, is) = (kind(needed.contains(name)), kind(needs.contains(name)));
                self.say(Some(name), format!("was {was}, is {is}"));
            }
            self.path.push(name.clone());
            self.node(was, schema);
            self.path.pop();
        }
    }
}

/// Keywords compared as they stand.
const KEYWORDS: &[&str] = &[
    "type",
    "const",
    "enum",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "format",
    "additionalProperties",
    "anyOf",
    "oneOf",
    "allOf",
];

/// RFC 6901.
fn pointer<'a>(steps: impl Iterator<Item = &'a str>) -> String {
    steps.fold(String::new(), |path, step| path + "/" + &step.replace('~', "~0").replace('/', "~1"))
}

struct Reading<'a> {
    reader: &'a Value,
    writer: &'a Value,
    path: Vec<String>,
    /// Pairs of references under comparison, or compared: types may refer to themselves.
    seen: BTreeSet<(String, String)>,
    breaks: Vec<Break>,
}

impl Reading<'_> {
    fn say(&mut self, detail: impl Into<String>) {
        let pointer = pointer(self.path.iter().map(String::as_str));
        self.breaks.push(Break { pointer, detail: detail.into() });
    }

    fn at(&mut self, step: &str, reader: &Value, writer: &Value) {
        self.path.push(step.to_owned());
        self.node(reader, writer);
        self.path.pop();
    }

    /// What would be said, without saying it.
    fn trial(&self, reader: &Value, writer: &Value) -> Vec<Break> {
        let mut trial = Reading {
            reader: self.reader,
            writer: self.writer,
            path: self.path.clone(),
            seen: self.seen.clone(),
            breaks: Vec::new(),
        };
        trial.node(reader, writer);
        trial.breaks
    }

    fn node(&mut self, reader: &Value, writer: &Value) {
        if let (Some(r), Some(w)) = (reference(reader), reference(writer))
            && !self.seen.insert((r.to_owned(), w.to_owned()))
        {
            return;
        }
        let (Some(reader), Some(writer)) = (resolve(self.reader, reader), resolve(self.writer, writer))
        else {
            self.say("a reference that leads nowhere");
            return;
        };
        match (reader, writer) {
            (Value::Bool(true), _) | (_, Value::Bool(false)) => {}
            (Value::Bool(false), _) => self.say("may be sent, and is refused"),
            (Value::Object(r), Value::Bool(true)) => self.schemas(r, &Map::new()),
            (Value::Object(r), Value::Object(w)) => self.schemas(r, w),
            _ => self.say("not a schema"),
        }
    }

    fn schemas(&mut self, reader: &Map<String, Value>, writer: &Map<String, Value>) {
        // A finite choice is looked at value by value.
        if let Some(values) = values(writer) {
            let known = Validator::compile_within(&Value::Object(reader.clone()), self.reader);
            for value in values {
                if known.as_ref().is_ok_and(|k| !k.is_valid(&value)) {
                    self.say(format!("{value} may be sent, and is not known"));
                }
            }
            return;
        }
        if let Some(known) = values(reader) {
            let known: Vec<String> = known.iter().map(Value::to_string).collect();
            self.say(format!("anything may be sent, and only {} is known", known.join(", ")));
            return;
        }
        for alternatives in ["anyOf", "oneOf"] {
            if let Some(of_writer) = writer.get(alternatives).and_then(Value::as_array) {
                for alternative in of_writer {
                    self.node(&Value::Object(reader.clone()), alternative);
                }
                return;
            }
        }
        for alternatives in ["anyOf", "oneOf"] {
            if let Some(of_reader) = reader.get(alternatives).and_then(Value::as_array) {
                let whole = Value::Object(writer.clone());
                if !of_reader.iter().any(|alternative| self.trial(alternative, &whole).is_empty()) {
                    self.say("fits none of the alternatives that are known");
                }
            }
        }
        for part in reader.get("allOf").and_then(Value::as_array).into_iter().flatten() {
            self.node(part, &Value::Object(writer.clone()));
        }
        self.types(reader, writer);
        self.bounds(reader, writer);
        let may_be = |word: &str| types(writer).iter().any(|t| t == word);
        if may_be("array")
            && let Some(items) = reader.get("items")
        {
            self.at("*", items, writer.get("items").unwrap_or(&Value::Bool(true)));
        }
        if may_be("object") {
            self.fields(reader, writer);
        }
    }

    fn types(&mut self, reader: &Map<String, Value>, writer: &Map<String, Value>) {
        let known = types(reader);
        let takes = |sent: &str| known.iter().any(|k| k == sent || (k == "number" && sent == "integer"));
        let unknown: Vec<String> = types(writer).into_iter().filter(|t| !takes(t)).collect();
        if !unknown.is_empty() {
            self.say(format!("may be {}, and must be {}", unknown.join(" or "), known.join(" or ")));
        }
    }

    fn bounds(&mut self, reader: &Map<String, Value>, writer: &Map<String, Value>) {
        let kinds = types(writer);
        for (keyword, kind, least, what) in [
            ("minimum", "number", true, "be as little as"),
            ("maximum", "number", false, "be as much as"),
            ("minLength", "string", true, "have as few characters as"),
            ("maxLength", "string", false, "have as many characters as"),
            ("minItems", "array", true, "have as few items as"),
            ("maxItems", "array", false, "have as many items as"),
        ] {
            let sent_at_all = kinds.iter().any(|k| k == kind || (kind == "number" && k == "integer"));
            let Some(bound) = reader.get(keyword).and_then(Value::as_f64).filter(|_| sent_at_all) else {
                continue;
            };
            let word = if least { "at least" } else { "at most" };
            match writer.get(keyword).and_then(Value::as_f64) {
                Some(sent) if if least { sent >= bound } else { sent <= bound } => {}
                Some(sent) => self.say(format!("may {what} {sent}, and must be {word} {bound}")),
                // No count is below zero.
                None if least && bound <= 0.0 && kind != "number" => {}
                None => self.say(format!("has no bound, and must be {word} {bound} ({keyword})")),
            }
        }
        let format = |s: &Map<String, Value>| {
            let named = s.get("format").and_then(Value::as_str);
            named.filter(|f| matches!(*f, "date-time" | "uuid")).map(str::to_owned)
        };
        if let Some(wanted) = format(reader)
            && format(writer).as_ref() != Some(&wanted)
            && kinds.iter().any(|k| k == "string")
        {
            self.say(format!("may be any text, and must be a {wanted}"));
        }
    }

    fn fields(&mut self, reader: &Map<String, Value>, writer: &Map<String, Value>) {
        let sent_for_sure = names(writer, "required");
        for name in names(reader, "required") {
            if !sent_for_sure.contains(&name) {
                let known = writer.get("properties").is_some_and(|p| p.get(&name).is_some());
                self.say(format!(
                    "`{name}` is required, and {}",
                    if known { "may be missing" } else { "is not sent" }
                ));
            }
        }
        let empty = Map::new();
        let properties = |s: &Map<String, Value>| s.get("properties").and_then(Value::as_object).cloned();
        let (known, sent) =
            (properties(reader).unwrap_or_else(|| empty.clone()), properties(writer).unwrap_or(empty));
        for (name, schema) in &sent {
            match (known.get(name), reader.get("additionalProperties")) {
                (Some(expected), _) | (None, Some(expected @ Value::Object(_))) => {
                    self.at(name, expected, schema);
                }
                (None, Some(Value::Bool(false))) => {
                    self.say(format!("`{name}` is sent, and unknown fields are refused"));
                }
                (None, _) => {}
            }
        }
        if let Some(others) = writer.get("additionalProperties").filter(|o| o.is_object()) {
            match reader.get("additionalProperties") {
                Some(expected @ Value::Object(_)) => self.at("*", expected, others),
                Some(Value::Bool(false)) => {
                    self.say("any further field may be sent, and unknown ones are refused");
                }
                _ => {}
            }
        }
    }
}

fn reference(schema: &Value) -> Option<&str> {
    schema.get("$ref").and_then(Value::as_str)
}

/// What a schema stands for, beyond its references.
fn resolve<'a>(root: &'a Value, mut schema: &'a Value) -> Option<&'a Value> {
    // So many references to references are no schema of ours.
    for _ in 0..32 {
        match reference(schema) {
            None => return Some(schema),
            Some("#") => schema = root,
            Some(pointer) => schema = root.pointer(pointer.strip_prefix('#')?)?,
        }
    }
    None
}

/// The values a schema allows, if it names them: `const`, `enum`, or a choice of constants.
fn values(schema: &Map<String, Value>) -> Option<Vec<Value>> {
    if let Some(constant) = schema.get("const") {
        return Some(vec![constant.clone()]);
    }
    if let Some(listed) = schema.get("enum").and_then(Value::as_array) {
        return Some(listed.clone());
    }
    let choice = schema.get("oneOf").or(schema.get("anyOf")).and_then(Value::as_array)?;
    let parts: Option<Vec<Vec<Value>>> = choice.iter().map(|c| values(c.as_object()?)).collect();
    Some(parts?.concat())
}

/// The types a schema allows; without any named, all.
fn types(schema: &Map<String, Value>) -> Vec<String> {
    match schema.get("type") {
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(several)) => several.iter().filter_map(|t| t.as_str().map(str::to_owned)).collect(),
        _ => ["null", "boolean", "number", "string", "array", "object"].map(str::to_owned).to_vec(),
    }
}

fn names(schema: &Map<String, Value>, list: &str) -> BTreeSet<String> {
    let listed = schema.get(list).and_then(Value::as_array).into_iter().flatten();
    listed.filter_map(|n| n.as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn object(properties: Value, required: Value) -> Value {
        json!({"type": "object", "properties": properties, "required": required})
    }

    fn said(breaks: &[Break]) -> String {
        breaks.iter().fold(String::new(), |all, b| all + &b.to_string() + "\n")
    }

    #[test]
    fn each_kind_of_change_is_named_in_the_right_direction() {
        let base = object(
            json!({"a": {"type": "integer", "minimum": 0, "maximum": 10}, "b": {"type": "string", "maxLength": 5}}),
            json!(["a"]),
        );
        let cases = [
            // What changes, the verdict, and what is said.
            (
                json!({"a": {"type": "integer", "minimum": 0, "maximum": 10}}),
                json!(["a"]),
                Compatibility::Full,
                "",
            ),
            (
                json!({"a": {"type": "integer", "minimum": 0, "maximum": 20}}),
                json!(["a"]),
                Compatibility::Backward,
                "/a: may be as much as 20",
            ),
            (
                json!({"a": {"type": "integer", "minimum": 1, "maximum": 10}}),
                json!(["a"]),
                Compatibility::Forward,
                "/a: may be as little as 0",
            ),
            (
                json!({"a": {"type": "string"}}),
                json!(["a"]),
                Compatibility::None,
                "/a: may be integer, and must be string",
            ),
            (
                json!({"a": {"type": "number", "minimum": 0, "maximum": 10}}),
                json!(["a"]),
                Compatibility::Backward,
                "may be number, and must be integer",
            ),
            (
                json!({"a": {"type": ["integer", "null"], "minimum": 0, "maximum": 10}}),
                json!(["a"]),
                Compatibility::Backward,
                "may be null",
            ),
            (
                json!({"a": {"type": "integer", "minimum": 0, "maximum": 10}}),
                json!([]),
                Compatibility::Backward,
                "`a` is required, and may be missing",
            ),
            (
                json!({"a": {"type": "integer", "minimum": 0, "maximum": 10}, "c": {"type": "string"}}),
                json!(["a", "c"]),
                Compatibility::Forward,
                "`c` is required, and is not sent",
            ),
            (
                json!({"b": {"type": "string", "maxLength": 5}}),
                json!([]),
                Compatibility::Backward,
                "`a` is required, and is not sent",
            ),
            (
                json!({"a": {"type": "integer", "minimum": 0, "maximum": 10}, "b": {"type": "string"}}),
                json!(["a"]),
                Compatibility::Backward,
                "/b: has no bound",
            ),
        ];
        for (properties, required, verdict, words) in cases {
            let new = object(properties, required);
            let found = compare(&base, &new);
            let text = said(&found.backward) + &said(&found.forward);
            assert_eq!(found.compatibility(), verdict, "{new}: {text}");
            assert!(text.contains(words), "{new}: {text}");
        }
    }

    #[test]
    fn changes_are_told_whether_they_break_or_not() {
        let old = object(
            json!({"a": {"type": "integer", "description": "x"}, "b": {"type": "string"}}),
            json!(["a"]),
        );
        let new = object(json!({"a": {"type": "integer", "maximum": 5}, "c": {"type": "null"}}), json!([]));
        let told = said(&changes(&old, &new));
        assert_eq!(
            told,
            "/b: removed; it was optional\n/a: was required, is optional\n/a: maximum was not set, is 5\n/c: added, optional\n"
        );
        assert!(changes(&old, &old).is_empty());
    }

    #[test]
    fn enums_references_and_closed_objects() {
        let small = json!({"$defs": {"C": {"enum": ["red", "green"]}}, "type": "array", "items": {"$ref": "#/$defs/C"}});
        let large = json!({"$defs": {"D": {"oneOf": [{"const": "red"}, {"enum": ["green", "blue"]}]}}, "type": "array", "items": {"$ref": "#/$defs/D"}});
        let found = compare(&small, &large);
        assert_eq!(found.compatibility(), Compatibility::Backward);
        assert_eq!(said(&found.forward), "/*: \"blue\" may be sent, and is not known\n");
        let open = json!({"type": "string"});
        assert_eq!(compare(&json!({"enum": ["a"]}), &open).compatibility(), Compatibility::Backward);
        let closed = json!({"type": "object", "properties": {}, "additionalProperties": false});
        let more = object(json!({"x": {"type": "null"}}), json!([]));
        assert!(said(&reads(&closed, &more)).contains("unknown fields are refused"));
        let tree = json!({"type": "object", "properties": {"left": {"$ref": "#"}, "n": {"type": "integer"}}});
        let other = json!({"type": "object", "properties": {"left": {"$ref": "#"}, "n": {"type": "string"}}});
        assert_eq!(compare(&tree, &tree).compatibility(), Compatibility::Full, "it ends");
        assert_eq!(compare(&tree, &other).compatibility(), Compatibility::None);
        let date = json!({"type": "string", "format": "date-time"});
        assert_eq!(compare(&date, &open).compatibility(), Compatibility::Backward);
    }

    fn schema() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(json!({"type": "null"})),
            Just(json!({"type": ["string", "null"]})),
            (0..4i64, 0..6i64)
                .prop_map(|(min, more)| json!({"type": "integer", "minimum": min, "maximum": min + more})),
            (0..2u64, 0..3u64)
                .prop_map(|(min, more)| json!({"type": "string", "minLength": min, "maxLength": min + more})),
            prop::sample::subsequence(vec!["a", "bb", "c"], 1..3).prop_map(|v| json!({"enum": v})),
            Just(json!(true)),
        ];
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                (inner.clone(), 0..3u64).prop_map(|(items, max)| json!({"type": "array", "items": items, "maxItems": max})),
                (inner.clone(), inner.clone(), any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(x, y, rx, ry, open)| {
                    let required: Vec<&str> = [("x", rx), ("y", ry)].iter().filter(|(_, r)| *r).map(|(n, _)| *n).collect();
                    json!({"type": "object", "properties": {"x": x, "y": y}, "required": required, "additionalProperties": open})
                }),
                (inner.clone(), inner).prop_map(|(a, b)| json!({"anyOf": [a, b]})),
            ]
        })
    }

    fn document() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(json!(null)),
            (0..8i64).prop_map(Value::from),
            prop::sample::select(vec!["", "a", "bb", "c", "dddd"]).prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                (prop::option::of(inner.clone()), prop::option::of(inner)).prop_map(|(x, y)| {
                    let fields = [("x", x), ("y", y)];
                    fields
                        .into_iter()
                        .filter_map(|(n, v)| Some((n.to_owned(), v?)))
                        .collect::<Map<_, _>>()
                        .into()
                }),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]
        /// Where no break is named, whatever the writer may send is read.
        #[test]
        fn what_is_called_compatible_is_read(reader in schema(), writer in schema(), documents in prop::collection::vec(document(), 12)) {
            if reads(&reader, &writer).is_empty() {
                let (reads, writes) = (Validator::compile(&reader).unwrap(), Validator::compile(&writer).unwrap());
                for document in documents {
                    // Fields that the writer does not name are not sent.
                    prop_assert!(!writes.is_valid(&document) || reads.is_valid(&document) || has_unnamed(&writer, &document),
                        "{document} is written by {writer} and not read by {reader}");
                }
            }
        }

        /// A schema reads itself.
        #[test]
        fn every_schema_reads_itself(schema in schema()) {
            prop_assert_eq!(reads(&schema, &schema), vec![]);
        }
    }

    /// Whether a document has what its writer's schema leaves open rather than says.
    fn has_unnamed(schema: &Value, document: &Value) -> bool {
        match (schema, document) {
            (Value::Bool(_), _) => true,
            (Value::Object(s), _) if s.contains_key("anyOf") => {
                s["anyOf"].as_array().is_some_and(|all| all.iter().any(|a| has_unnamed(a, document)))
            }
            (Value::Object(s), Value::Object(d)) => {
                d.iter().any(|(name, value)| match s.get("properties").and_then(|p| p.get(name)) {
                    Some(schema) => has_unnamed(schema, value),
                    None => true,
                })
            }
            (Value::Object(s), Value::Array(d)) => {
                s.get("items").is_some_and(|items| d.iter().any(|v| has_unnamed(items, v)))
            }
            _ => false,
        }
    }
}
