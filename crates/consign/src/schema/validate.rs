//! Validates documents against the JSON Schemas that schemars makes of our types.
//!
//! The `jsonschema` crate knows all of JSON Schema, and with the regex crates it brings it was more than a quarter of a newcomer's first
//! build. This knows the keywords our types produce, and refuses a schema with any other when it is compiled, so nothing is passed over in silence. A property test compares
//! every verdict with the `jsonschema` crate's.

use std::collections::HashMap;

use serde_json::{Map, Value};
use thiserror::Error;

use super::Fault;
use crate::Timestamp;

/// The schema uses what is not known here.
#[derive(Debug, Error)]
#[error("the schema at {pointer} has `{keyword}`, which is not supported")]
pub struct Unsupported {
    pointer: String,
    keyword: String,
}

/// Says nothing about what is valid.
const ANNOTATIONS: &[&str] = &[
    "$schema",
    "$id",
    "$defs",
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
];

/// A schema compiled: references resolved to indices, so that recursive types need no recursion here.
#[derive(Debug)]
pub(super) struct Validator {
    nodes: Vec<Node>,
}

#[derive(Debug, Default)]
struct Node {
    never: bool,
    reference: Option<usize>,
    types: Vec<Type>,
    constant: Option<Value>,
    one_of_values: Option<Vec<Value>>,
    minimum: Option<f64>,
    maximum: Option<f64>,
    min_length: Option<u64>,
    max_length: Option<u64>,
    format: Option<Format>,
    min_items: Option<u64>,
    max_items: Option<u64>,
    items: Option<usize>,
    properties: Vec<(String, usize)>,
    required: Vec<String>,
    additional: Option<usize>,
    any_of: Vec<usize>,
    one_of: Vec<usize>,
    all_of: Vec<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    Null,
    Boolean,
    Integer,
    Number,
    String,
    Array,
    Object,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    DateTime,
    Uuid,
}

impl Type {
    fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "null" => Self::Null,
            "boolean" => Self::Boolean,
            "integer" => Self::Integer,
            "number" => Self::Number,
            "string" => Self::String,
            "array" => Self::Array,
            "object" => Self::Object,
            _ => return None,
        })
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Boolean => "boolean",
            Self::Integer => "integer",
            Self::Number => "number",
            Self::String => "string",
            Self::Array => "array",
            Self::Object => "object",
        }
    }

    fn fits(self, value: &Value) -> bool {
        match self {
            Self::Null => value.is_null(),
            Self::Boolean => value.is_boolean(),
            // 1.0 is an integer to JSON Schema.
            Self::Integer => {
                value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|f| f.fract() == 0.0)
            }
            Self::Number => value.is_number(),
            Self::String => value.is_string(),
            Self::Array => value.is_array(),
            Self::Object => value.is_object(),
        }
    }
}

/// What compiling keeps in mind.
struct Compiler<'a> {
    root: &'a Value,
    nodes: Vec<Node>,
    by_reference: HashMap<String, usize>,
}

impl Validator {
    pub(super) fn compile(schema: &Value) -> Result<Self, Unsupported> {
        let mut compiler = Compiler { root: schema, nodes: Vec::new(), by_reference: HashMap::new() };
        compiler.node(schema, "#")?;
        Ok(Self { nodes: compiler.nodes })
    }

    /// A part of a schema, whose references lead into the whole.
    pub(super) fn compile_within(part: &Value, whole: &Value) -> Result<Self, Unsupported> {
        let mut compiler = Compiler { root: whole, nodes: Vec::new(), by_reference: HashMap::new() };
        compiler.node(part, "#")?;
        Ok(Self { nodes: compiler.nodes })
    }

    pub(super) fn is_valid(&self, value: &Value) -> bool {
        self.check(0, value, &mut None)
    }

    /// Up to `limit` faults.
    pub(super) fn faults(&self, value: &Value, limit: usize) -> Vec<Fault> {
        let mut report = Some(Report { path: Vec::new(), faults: Vec::new(), limit });
        self.check(0, value, &mut report);
        report.map(|r| r.faults).unwrap_or_default()
    }
}

impl Compiler<'_> {
    fn node(&mut self, schema: &Value, pointer: &str) -> Result<usize, Unsupported> {
        let at = self.nodes.len();
        self.nodes.push(Node::default());
        let map = match schema {
            Value::Bool(valid) => {
                self.nodes[at].never = !valid;
                return Ok(at);
            }
            Value::Object(map) => map,
            _ => return Err(Unsupported { pointer: pointer.to_owned(), keyword: schema.to_string() }),
        };
        let mut node = Node::default();
        for (keyword, value) in map {
            let here = format!("{pointer}/{keyword}");
            let unsupported =
                || Unsupported { pointer: pointer.to_owned(), keyword: format!("{keyword}: {value}") };
            match keyword.as_str() {
                "$ref" => node.reference = Some(self.reference(value.as_str().ok_or_else(unsupported)?)?),
                "type" => {
                    let words = value.as_array().map_or_else(|| vec![value], |a| a.iter().collect());
                    for word in words {
                        node.types.push(word.as_str().and_then(Type::parse).ok_or_else(unsupported)?);
                    }
                }
                "const" => node.constant = Some(value.clone()),
                "enum" => node.one_of_values = Some(value.as_array().ok_or_else(unsupported)?.clone()),
                "minimum" => node.minimum = Some(value.as_f64().ok_or_else(unsupported)?),
                "maximum" => node.maximum = Some(value.as_f64().ok_or_else(unsupported)?),
                "minLength" => node.min_length = Some(value.as_u64().ok_or_else(unsupported)?),
                "maxLength" => node.max_length = Some(value.as_u64().ok_or_else(unsupported)?),
                "minItems" => node.min_items = Some(value.as_u64().ok_or_else(unsupported)?),
                "maxItems" => node.max_items = Some(value.as_u64().ok_or_else(unsupported)?),
                "format" => match value.as_str() {
                    Some("date-time") => node.format = Some(Format::DateTime),
                    Some("uuid") => node.format = Some(Format::Uuid),
                    // Widths of Rust's numbers: the type's range says the same.
                    Some(
                        "uint" | "uint8" | "uint16" | "uint32" | "uint64" | "int8" | "int16" | "int32"
                        | "int64" | "float" | "double",
                    ) => {}
                    _ => return Err(unsupported()),
                },
                "items" => node.items = Some(self.node(value, &here)?),
                "additionalProperties" => node.additional = Some(self.node(value, &here)?),
                "properties" => {
                    for (name, schema) in value.as_object().ok_or_else(unsupported)? {
                        let child = self.node(schema, &format!("{here}/{name}"))?;
                        node.properties.push((name.clone(), child));
                    }
                }
                "required" => {
                    for name in value.as_array().ok_or_else(unsupported)? {
                        node.required.push(name.as_str().ok_or_else(unsupported)?.to_owned());
                    }
                }
                "anyOf" | "oneOf" | "allOf" => {
                    let mut children = Vec::new();
                    for schema in value.as_array().ok_or_else(unsupported)? {
                        children.push(self.node(schema, &here)?);
                    }
                    match keyword.as_str() {
                        "anyOf" => node.any_of = children,
                        "oneOf" => node.one_of = children,
                        _ => node.all_of = children,
                    }
                }
                annotation if ANNOTATIONS.contains(&annotation) => {}
                _ => return Err(unsupported()),
            }
        }
        self.nodes[at] = node;
        Ok(at)
    }

    fn reference(&mut self, reference: &str) -> Result<usize, Unsupported> {
        if reference == "#" {
            return Ok(0);
        }
        if let Some(&known) = self.by_reference.get(reference) {
            return Ok(known);
        }
        let target = reference.strip_prefix('#').and_then(|p| self.root.pointer(p)).cloned();
        let target =
            target.ok_or_else(|| Unsupported { pointer: reference.to_owned(), keyword: "$ref".into() })?;
        // Known before it is compiled, for it may refer to itself.
        self.by_reference.insert(reference.to_owned(), self.nodes.len());
        self.node(&target, reference)
    }
}

/// Where we are, and what was found.
struct Report<'a> {
    path: Vec<Step<'a>>,
    faults: Vec<Fault>,
    limit: usize,
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Name(&'a str),
    Index(usize),
}

impl Report<'_> {
    fn add(&mut self, detail: impl FnOnce() -> String) {
        if self.faults.len() >= self.limit {
            return;
        }
        let mut pointer = String::new();
        for step in &self.path {
            pointer.push('/');
            match step {
                // RFC 6901, section 3.
                Step::Name(name) => pointer.push_str(&name.replace('~', "~0").replace('/', "~1")),
                Step::Index(i) => pointer.push_str(&i.to_string()),
            }
        }
        self.faults.push(Fault { pointer, detail: detail() });
    }
}

impl Validator {
    /// Whether the value satisfies the node. Without a report it stops at the first fault; with one it finds them all.
    fn check<'a>(&'a self, node: usize, value: &'a Value, report: &mut Option<Report<'a>>) -> bool {
        let n = &self.nodes[node];
        let mut valid = true;
        macro_rules! fault {
            ($($detail:tt)*) => {{
                valid = false;
                match report {
                    Some(report) => report.add(|| format!($($detail)*)),
                    None => return false,
                }
            }};
        }
        macro_rules! child {
            ($node:expr, $value:expr, $step:expr) => {{
                if let Some(report) = report {
                    report.path.push($step);
                }
                let fits = self.check($node, $value, report);
                if let Some(report) = report {
                    report.path.pop();
                }
                if !fits {
                    valid = false;
                    if report.is_none() {
                        return false;
                    }
                }
            }};
        }
        if n.never {
            fault!("must not be here");
        }
        if let Some(reference) = n.reference
            && !self.check(reference, value, report)
        {
            valid = false;
            if report.is_none() {
                return false;
            }
        }
        if !n.types.is_empty() && !n.types.iter().any(|t| t.fits(value)) {
            let wanted: Vec<&str> = n.types.iter().map(|t| t.word()).collect();
            fault!("must be of type {}", wanted.join(" or "));
        }
        if let Some(constant) = &n.constant
            && !equal(constant, value)
        {
            fault!("must be {constant}");
        }
        if let Some(values) = &n.one_of_values
            && !values.iter().any(|v| equal(v, value))
        {
            let words: Vec<String> = values.iter().map(Value::to_string).collect();
            fault!("must be one of {}", words.join(", "));
        }
        match value {
            Value::Number(number) => {
                let f = number.as_f64().unwrap_or(f64::NAN);
                if let Some(minimum) = n.minimum.filter(|m| f < *m) {
                    fault!("{number} is less than the minimum of {minimum}");
                }
                if let Some(maximum) = n.maximum.filter(|m| f > *m) {
                    fault!("{number} is greater than the maximum of {maximum}");
                }
            }
            Value::String(text) => {
                if n.min_length.is_some() || n.max_length.is_some() {
                    let length = text.chars().count() as u64;
                    if let Some(min) = n.min_length.filter(|m| length < *m) {
                        fault!("must have at least {min} characters");
                    }
                    if let Some(max) = n.max_length.filter(|m| length > *m) {
                        fault!("must have at most {max} characters");
                    }
                }
                match n.format {
                    Some(Format::DateTime) if text.parse::<Timestamp>().is_err() => {
                        fault!("must be a date-time as in RFC 3339");
                    }
                    Some(Format::Uuid) if !is_uuid(text) => fault!("must be a UUID"),
                    _ => {}
                }
            }
            Value::Array(items) => {
                let length = items.len() as u64;
                if let Some(min) = n.min_items.filter(|m| length < *m) {
                    fault!("must have at least {min} items");
                }
                if let Some(max) = n.max_items.filter(|m| length > *m) {
                    fault!("must have at most {max} items");
                }
                if let Some(schema) = n.items {
                    for (i, item) in items.iter().enumerate() {
                        child!(schema, item, Step::Index(i));
                    }
                }
            }
            Value::Object(map) => {
                for name in &n.required {
                    if !map.contains_key(name) {
                        fault!("`{name}` is missing");
                    }
                }
                for (name, schema) in &n.properties {
                    if let Some(value) = map.get(name) {
                        child!(*schema, value, Step::Name(name));
                    }
                }
                if let Some(schema) = n.additional {
                    for (name, value) in others(map, &n.properties) {
                        child!(schema, value, Step::Name(name));
                    }
                }
            }
            Value::Null | Value::Bool(_) => {}
        }
        for &schema in &n.all_of {
            if !self.check(schema, value, report) {
                valid = false;
                if report.is_none() {
                    return false;
                }
            }
        }
        if !n.any_of.is_empty() && !n.any_of.iter().any(|&s| self.check(s, value, &mut None)) {
            fault!("is none of what it could be");
        }
        if !n.one_of.is_empty() {
            let fitting = n.one_of.iter().filter(|&&s| self.check(s, value, &mut None)).count();
            if fitting != 1 {
                let constants: Vec<String> = n
                    .one_of
                    .iter()
                    .filter_map(|&s| self.nodes[s].constant.as_ref())
                    .map(Value::to_string)
                    .collect();
                if constants.len() == n.one_of.len() {
                    fault!("must be one of {}", constants.join(", "));
                } else {
                    fault!("must be exactly one of what it could be, and is {fitting}");
                }
            }
        }
        valid
    }
}

/// Properties that the schema does not name.
fn others<'a>(
    map: &'a Map<String, Value>,
    named: &'a [(String, usize)],
) -> impl Iterator<Item = (&'a str, &'a Value)> {
    map.iter().filter(|(name, _)| !named.iter().any(|(n, _)| n == *name)).map(|(n, v)| (n.as_str(), v))
}

/// Equality as JSON Schema has it: 1 is 1.0.
fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => x == y || x.as_f64() == y.as_f64(),
        _ => a == b,
    }
}

/// `8-4-4-4-12` hexadecimal digits; other spellings of UUIDs are not the format's.
fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(i, b)| match i {
            8 | 13 | 18 | 23 => b == b'-',
            _ => b.is_ascii_hexdigit(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::generate;
    use proptest::prelude::*;
    use schemars::JsonSchema;
    use serde_json::json;
    use uuid::Uuid;

    #[derive(JsonSchema)]
    #[serde(rename_all = "snake_case")]
    #[expect(dead_code, reason = "only its schema is used")]
    enum Colour {
        Red,
        /// With words of its own it becomes a `oneOf` of constants.
        Green,
    }

    #[derive(JsonSchema)]
    #[expect(dead_code, reason = "only its schema is used")]
    struct Line {
        #[schemars(length(min = 1, max = 3))]
        id: String,
        #[schemars(range(min = 1, max = 10))]
        quantity: u32,
    }

    #[derive(JsonSchema)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only its schema is used")]
    struct Whole {
        id: Uuid,
        at: Timestamp,
        #[schemars(length(min = 1, max = 2))]
        lines: Vec<Line>,
        colour: Option<Colour>,
        ratio: f64,
        children: Option<Vec<Whole>>,
        flag: Option<bool>,
        tags: std::collections::BTreeMap<String, i64>,
    }

    /// Values near the schema: mostly of the right shape, with something off here and there.
    fn value() -> impl Strategy<Value = Value> {
        let wild = || {
            prop_oneof![
                Just(json!(null)),
                Just(json!(true)),
                Just(json!(0)),
                Just(json!(1.0)),
                Just(json!(1.5)),
                Just(json!(-1)),
                Just(json!(11)),
                Just(json!("")),
                Just(json!("abcd")),
                Just(json!("red")),
                Just(json!([])),
                Just(json!({})),
                Just(json!({"a": 1})),
            ]
        };
        let or_wild = move |s: BoxedStrategy<Value>| prop_oneof![6 => s, 1 => wild()].boxed();
        let id = or_wild(
            prop_oneof![
                Just(json!("018f0e3c-0000-7000-8000-000000000000")),
                Just(json!("018f0e3c00007000800000000000000z")),
                Just(json!("018f0e3c000070008000000000000000")),
            ]
            .boxed(),
        );
        let at = or_wild(
            prop_oneof![
                Just(json!("2026-01-02T03:04:05.5Z")),
                Just(json!("2026-01-02T03:04:05+01:00")),
                Just(json!("2026-13-02T03:04:05Z"))
            ]
            .boxed(),
        );
        let line =
            or_wild(("[a-d]{0,4}", -1..12i64).prop_map(|(id, q)| json!({"id": id, "quantity": q})).boxed());
        let lines = or_wild(prop::collection::vec(line, 0..4).prop_map(Value::from).boxed());
        let colour =
            or_wild(prop_oneof![Just(json!("red")), Just(json!("green")), Just(json!("blue"))].boxed());
        let tags =
            or_wild(prop_oneof![Just(json!({})), Just(json!({"x": 1})), Just(json!({"x/~y": "no"}))].boxed());
        let flat = (id, at, lines, colour, wild(), tags, 0..9usize, any::<bool>())
            .prop_map(|(id, at, lines, colour, ratio, tags, drop, extra)| {
                let mut v = json!({"id": id, "at": at, "lines": lines, "colour": colour, "ratio": ratio, "tags": tags});
                if let Some(map) = v.as_object_mut() {
                    let name = map.keys().nth(drop).cloned();
                    if let Some(name) = name { map.remove(&name); }
                    if extra && drop > 7 { map.insert("unknown".into(), json!(1)); }
                }
                v
            });
        let flat = flat.boxed();
        (flat.clone(), prop::option::of(prop::collection::vec(flat, 0..2))).prop_map(|(mut v, children)| {
            if let Some(children) = children {
                v["children"] = Value::from(children);
            }
            v
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]
        /// The same verdict as the `jsonschema` crate, and faults exactly when invalid.
        #[test]
        fn agrees_with_the_jsonschema_crate(value in value()) {
            static SCHEMA: std::sync::LazyLock<(Validator, jsonschema::Validator)> = std::sync::LazyLock::new(|| {
                let schema = generate::<Whole>();
                let oracle = jsonschema::options().should_validate_formats(true).build(&schema).unwrap();
                (Validator::compile(&schema).unwrap(), oracle)
            });
            let (ours, oracle) = &*SCHEMA;
            prop_assert_eq!(ours.is_valid(&value), oracle.is_valid(&value), "{}", value);
            prop_assert_eq!(ours.faults(&value, 100).is_empty(), ours.is_valid(&value));
        }
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let e = Validator::compile(&json!({"properties": {"a": {"patternProperties": {}}}})).unwrap_err();
        assert!(e.to_string().contains("patternProperties"), "{e}");
        assert!(Validator::compile(&json!({"$ref": "#/$defs/nowhere"})).is_err());
        assert!(Validator::compile(&json!({"format": "hostname"})).is_err());
    }

    #[test]
    fn pointers_are_escaped() {
        let v = Validator::compile(&json!({"additionalProperties": {"type": "integer"}})).unwrap();
        let faults = v.faults(&json!({"a/b~c": "x"}), 9);
        assert_eq!(faults[0].pointer, "/a~1b~0c");
    }
}
