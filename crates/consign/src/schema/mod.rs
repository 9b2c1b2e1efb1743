//! JSON Schemas of events and request bodies: generated from the types, compiled once, and asked on both ends.

pub mod bounds;
pub mod compat;
mod validate;

use std::any::TypeId;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::Serialize;
use serde_json::Value;
use thiserror::Error;

use crate::Event;
use validate::{Unsupported, Validator};

/// One thing wrong with a document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Fault {
    /// Where: a JSON pointer (RFC 6901), empty for the whole.
    pub pointer: String,
    /// What, and what would be right.
    pub detail: String,
}

/// A document breaks its schema.
#[derive(Clone, Debug, Error)]
pub struct SchemaViolation {
    /// Which schema.
    pub schema: String,
    /// Everything that is wrong with it.
    pub faults: Vec<Fault>,
}

impl fmt::Display for SchemaViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not a valid {}:", self.schema)?;
        for (i, fault) in self.faults.iter().enumerate() {
            let pointer = if fault.pointer.is_empty() { "/" } else { &fault.pointer };
            write!(f, "{} {pointer}: {}", if i == 0 { "" } else { ";" }, fault.detail)?;
        }
        Ok(())
    }
}

/// A schema that cannot be validated against.
#[derive(Debug, Error)]
#[error("the schema {name} cannot be used")]
pub struct UnsupportedSchema {
    name: String,
    #[source]
    source: Unsupported,
}

/// A schema ready to validate.
#[derive(Debug)]
pub struct CompiledSchema {
    name: String,
    document: Value,
    validator: Validator,
}

/// So many faults are reported; a hostile document could have any number.
const MAX_FAULTS: usize = 32;

impl CompiledSchema {
    #[expect(
        clippy::panic,
        reason = "schemas come from types, so a type that cannot be validated is found by its first use in any test"
    )]
    fn new(name: String, document: Value) -> Self {
        let validator =
            Validator::compile(&document).unwrap_or_else(|e| panic!("{name} cannot be validated: {e}"));
        Self { name, document, validator }
    }

    /// A schema from elsewhere, a file perhaps.
    ///
    /// # Errors
    /// It uses a keyword that our types never produce, and that is not supported.
    pub fn parse(name: &str, document: Value) -> Result<Self, UnsupportedSchema> {
        let validator = Validator::compile(&document)
            .map_err(|source| UnsupportedSchema { name: name.to_owned(), source })?;
        Ok(Self { name: name.to_owned(), document, validator })
    }

    /// The schema itself.
    pub fn document(&self) -> &Value {
        &self.document
    }

    /// Every fault of `value`, up to a limit.
    pub fn validate(&self, value: &Value) -> Result<(), SchemaViolation> {
        // The quick check first: valid documents are the rule.
        if self.validator.is_valid(value) {
            return Ok(());
        }
        let faults = self.validator.faults(value, MAX_FAULTS);
        Err(SchemaViolation { schema: self.name.clone(), faults })
    }
}

static COMPILED: LazyLock<RwLock<HashMap<TypeId, Arc<CompiledSchema>>>> = LazyLock::new(RwLock::default);

/// An event's schema, compiled on first use.
pub fn of<E: Event>() -> Arc<CompiledSchema> {
    cached::<E>(|| {
        let mut document = generate::<E>();
        document["$id"] = Value::String(format!("urn:consign:schema:{}", E::name()));
        document["title"] = Value::String(E::name());
        CompiledSchema::new(E::name(), document)
    })
}

/// Any type's schema, compiled on first use.
pub fn of_type<T: JsonSchema + 'static>() -> Arc<CompiledSchema> {
    cached::<T>(|| CompiledSchema::new(T::schema_name().into_owned(), generate::<T>()))
}

fn cached<T: 'static>(make: impl FnOnce() -> CompiledSchema) -> Arc<CompiledSchema> {
    let id = TypeId::of::<T>();
    if let Some(found) = COMPILED.read().unwrap_or_else(PoisonError::into_inner).get(&id) {
        return Arc::clone(found);
    }
    let made = Arc::new(make());
    Arc::clone(COMPILED.write().unwrap_or_else(PoisonError::into_inner).entry(id).or_insert(made))
}

fn generate<T: JsonSchema>() -> Value {
    SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<T>().to_value()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Clone, Serialize, Deserialize, JsonSchema, Event)]
    #[event(type = "tests.happened", version = 3)]
    struct Happened {
        #[schemars(range(min = 1))]
        count: u32,
        #[schemars(length(min = 1, max = 5))]
        name: String,
    }

    #[test]
    fn every_fault_is_named_with_its_pointer() {
        let e = of::<Happened>().validate(&json!({"count": 0, "name": "too long"})).unwrap_err();
        let pointers: Vec<&str> = e.faults.iter().map(|f| f.pointer.as_str()).collect();
        assert_eq!(pointers, ["/count", "/name"]);
        assert!(of::<Happened>().validate(&json!({"count": 1, "name": "ok"})).is_ok());
    }

    #[test]
    fn schemas_carry_their_id() {
        assert_eq!(of::<Happened>().document()["$id"], "urn:consign:schema:tests.happened.v3");
    }
}
