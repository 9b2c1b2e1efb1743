//! One SQL text for two databases.
//!
//! SQLite and PostgreSQL agree on most of what a service needs. Where they do not, a text has one of three marks, which are replaced
//! before it is sent; and where whole statements differ, both stand side by side in [`Tx::query_each`](super::Tx::query_each).
//!
//! | mark | PostgreSQL | SQLite |
//! |---|---|---|
//! | `{$2: id, amount}` | `unnest($2, $3) AS r(id, amount)` | the rows of one JSON parameter, as a table `r` with these columns |
//! | `{lock}` | `FOR UPDATE` | nothing: there is one writer |
//! | `{skip}` | `FOR UPDATE SKIP LOCKED` | nothing |
//!
//! A column of bytes in the first mark is written `payload bytes`. Its parameter is the last, and given by [`Query::rows`].

use std::collections::HashMap;
use std::sync::{LazyLock, PoisonError, RwLock};

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::error::{BoxDynError, UnexpectedNullError};
use sqlx::postgres::{PgArguments, PgHasArrayType, PgRow};
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::types::Json as SqlJson;
use sqlx::{
    Arguments, Column, Encode, PgConnection, PgPool, Postgres, Row as _, Sqlite, SqliteConnection,
    SqlitePool, Type, ValueRef,
};
use time::OffsetDateTime;
use uuid::Uuid;

use super::DbError;
use crate::Timestamp;

/// A value in JSON: `jsonb` in PostgreSQL, text in SQLite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Json<T>(pub T);

/// Which database a text is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Dialect {
    Sqlite,
    Postgres,
}

/// A text with its marks replaced. Texts are few and written in the program, so they are kept for good.
pub(crate) fn expand(text: &'static str, dialect: Dialect) -> &'static str {
    type Known = RwLock<HashMap<(&'static str, Dialect), &'static str>>;
    static KNOWN: LazyLock<Known> = LazyLock::new(RwLock::default);
    if !text.contains('{') {
        return text;
    }
    if let Some(known) = KNOWN.read().unwrap_or_else(PoisonError::into_inner).get(&(text, dialect)) {
        return known;
    }
    let expanded: &'static str = replace_marks(text, dialect).leak();
    KNOWN.write().unwrap_or_else(PoisonError::into_inner).insert((text, dialect), expanded);
    expanded
}

fn replace_marks(text: &str, dialect: Dialect) -> String {
    let mut out = String::with_capacity(text.len() * 2);
    let mut rest = text;
    while let Some((before, marked)) = rest.split_once('{') {
        out.push_str(before);
        let (mark, after) = marked.split_once('}').unwrap_or((marked, ""));
        match (mark, dialect) {
            ("lock" | "skip", Dialect::Sqlite) => {}
            ("lock", Dialect::Postgres) => out.push_str("FOR UPDATE"),
            ("skip", Dialect::Postgres) => out.push_str("FOR UPDATE SKIP LOCKED"),
            (rows, _) => out.push_str(&table(rows, dialect)),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// `$2: id, payload bytes` as a table called `r`.
fn table(rows: &str, dialect: Dialect) -> String {
    let (parameter, columns) = rows.split_once(':').unwrap_or((rows, ""));
    let columns: Vec<(&str, bool)> = columns
        .split(',')
        .map(|c| {
            let c = c.trim();
            c.strip_suffix(" bytes").map_or((c, false), |name| (name, true))
        })
        .collect();
    match dialect {
        Dialect::Sqlite => {
            let values: Vec<String> = columns
                .iter()
                .enumerate()
                .map(|(i, (name, bytes))| {
                    if *bytes {
                        format!("CAST(value ->> {i} AS BLOB) AS {name}")
                    } else {
                        format!("value ->> {i} AS {name}")
                    }
                })
                .collect();
            format!("(SELECT {} FROM json_each({parameter})) AS r", values.join(", "))
        }
        Dialect::Postgres => {
            let first: usize = parameter.trim_start_matches('$').parse().unwrap_or(1);
            let parameters: Vec<String> = (first..first + columns.len()).map(|n| format!("${n}")).collect();
            let names: Vec<&str> = columns.iter().map(|(name, _)| *name).collect();
            format!("unnest({}) AS r({})", parameters.join(", "), names.join(", "))
        }
    }
}

pub(crate) enum Target<'c> {
    Sqlite(&'c mut SqliteConnection),
    SqlitePool(&'c SqlitePool),
    Postgres(&'c mut PgConnection),
    PgPool(&'c PgPool),
}

enum Given {
    Sqlite(SqliteArguments),
    Postgres(PgArguments),
}

/// A statement being put together. Begun by [`Tx::query`](super::Tx::query) or [`Db::query`](super::Db::query).
#[must_use = "a statement does nothing until it is executed"]
pub struct Query<'c> {
    target: Target<'c>,
    text: &'static str,
    given: Given,
    fault: Option<BoxDynError>,
}

impl<'c> Query<'c> {
    pub(crate) fn new(target: Target<'c>, text: &'static str) -> Self {
        let (dialect, given) = match target {
            Target::Sqlite(_) | Target::SqlitePool(_) => {
                (Dialect::Sqlite, Given::Sqlite(SqliteArguments::default()))
            }
            Target::Postgres(_) | Target::PgPool(_) => {
                (Dialect::Postgres, Given::Postgres(PgArguments::default()))
            }
        };
        Self { target, text: expand(text, dialect), given, fault: None }
    }

    /// The next parameter.
    pub fn bind(mut self, value: impl Bind) -> Self {
        let added = match &mut self.given {
            Given::Sqlite(arguments) => arguments.add(value.sqlite()),
            Given::Postgres(arguments) => arguments.add(value.postgres()),
        };
        self.fault = self.fault.or(added.err());
        self
    }

    /// The rows of `{$n: …}`: the last parameter.
    pub fn rows<R: Rows>(mut self, rows: impl IntoIterator<Item = R>) -> Self {
        let added = match &mut self.given {
            Given::Sqlite(arguments) => as_json(rows).and_then(|json| arguments.add(json)),
            Given::Postgres(arguments) => R::columns(rows, arguments),
        };
        self.fault = self.fault.or(added.err());
        self
    }

    /// Runs it; how many rows it touched.
    pub async fn execute(self) -> Result<u64, DbError> {
        if let Some(fault) = self.fault {
            return Err(DbError::Sql(sqlx::Error::Encode(fault)));
        }
        let text = self.text;
        Ok(match (self.target, self.given) {
            (Target::Sqlite(c), Given::Sqlite(a)) => {
                sqlx::query_with(text, a).execute(c).await?.rows_affected()
            }
            (Target::SqlitePool(c), Given::Sqlite(a)) => {
                sqlx::query_with(text, a).execute(c).await?.rows_affected()
            }
            (Target::Postgres(c), Given::Postgres(a)) => {
                sqlx::query_with(text, a).execute(c).await?.rows_affected()
            }
            (Target::PgPool(c), Given::Postgres(a)) => {
                sqlx::query_with(text, a).execute(c).await?.rows_affected()
            }
            _ => 0,
        })
    }

    /// Runs it; the rows it returned.
    pub async fn fetch_all(self) -> Result<Vec<Row>, DbError> {
        if let Some(fault) = self.fault {
            return Err(DbError::Sql(sqlx::Error::Encode(fault)));
        }
        let text = self.text;
        let sqlite = |rows: Vec<SqliteRow>| rows.into_iter().map(Row::Sqlite).collect();
        let postgres = |rows: Vec<PgRow>| rows.into_iter().map(Row::Postgres).collect();
        Ok(match (self.target, self.given) {
            (Target::Sqlite(c), Given::Sqlite(a)) => sqlite(sqlx::query_with(text, a).fetch_all(c).await?),
            (Target::SqlitePool(c), Given::Sqlite(a)) => {
                sqlite(sqlx::query_with(text, a).fetch_all(c).await?)
            }
            (Target::Postgres(c), Given::Postgres(a)) => {
                postgres(sqlx::query_with(text, a).fetch_all(c).await?)
            }
            (Target::PgPool(c), Given::Postgres(a)) => {
                postgres(sqlx::query_with(text, a).fetch_all(c).await?)
            }
            _ => Vec::new(),
        })
    }

    /// The first row, if there is one.
    pub async fn fetch_optional(self) -> Result<Option<Row>, DbError> {
        Ok(self.fetch_all().await?.into_iter().next())
    }

    /// The first row.
    ///
    /// # Errors
    /// There is none, or it could not be read.
    pub async fn fetch_one(self) -> Result<Row, DbError> {
        self.fetch_optional().await?.ok_or(DbError::Sql(sqlx::Error::RowNotFound))
    }

    /// The first column of the first row.
    pub async fn fetch_scalar<T: Fetch>(self) -> Result<T, DbError> {
        let row = self.fetch_one().await?;
        let name = match &row {
            Row::Sqlite(r) => r.columns().first().map(|c| c.name().to_owned()),
            Row::Postgres(r) => r.columns().first().map(|c| c.name().to_owned()),
        };
        row.get(&name.unwrap_or_default())
    }
}

/// A row of either database.
#[derive(Debug)]
pub enum Row {
    /// From SQLite.
    Sqlite(SqliteRow),
    /// From PostgreSQL.
    Postgres(PgRow),
}

impl Row {
    /// A column by its name.
    ///
    /// # Errors
    /// There is no such column, or it holds something else.
    pub fn get<T: Fetch>(&self, column: &str) -> Result<T, DbError> {
        Ok(match self {
            Self::Sqlite(row) => T::sqlite(row, column)?,
            Self::Postgres(row) => T::postgres(row, column)?,
        })
    }

    /// A column of text, parsed.
    pub fn parse<T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>>(
        &self,
        column: &str,
    ) -> Result<T, DbError> {
        self.get::<String>(column)?
            .parse()
            .map_err(|e: T::Err| DbError::Sql(sqlx::Error::Decode(Box::new(e))))
    }
}

/// A value that can be a parameter.
pub trait Bind {
    /// As PostgreSQL takes it.
    type Postgres: for<'q> Encode<'q, Postgres> + Type<Postgres> + PgHasArrayType;
    /// As SQLite takes it.
    type Sqlite: for<'q> Encode<'q, Sqlite> + Type<Sqlite>;
    /// For PostgreSQL.
    fn postgres(self) -> Self::Postgres;
    /// For SQLite, as a parameter of its own.
    fn sqlite(self) -> Self::Sqlite;
    /// For SQLite, in the JSON of many rows.
    fn json(self, out: &mut Vec<u8>) -> Result<(), BoxDynError>;
}

/// A value that can be read from a row.
pub trait Fetch: Sized {
    /// From SQLite.
    fn sqlite(row: &SqliteRow, column: &str) -> Result<Self, sqlx::Error>;
    /// From PostgreSQL.
    fn postgres(row: &PgRow, column: &str) -> Result<Self, sqlx::Error>;
}

/// Rows as an array of arrays.
fn as_json<R: Rows>(rows: impl IntoIterator<Item = R>) -> Result<String, BoxDynError> {
    let mut out = vec![b'['];
    for (i, row) in rows.into_iter().enumerate() {
        out.extend_from_slice(if i == 0 { b"[" } else { b",[" });
        row.json(&mut out)?;
        out.push(b']');
    }
    out.push(b']');
    Ok(String::from_utf8(out)?)
}

fn write(value: &(impl Serialize + ?Sized), out: &mut Vec<u8>) -> Result<(), BoxDynError> {
    Ok(serde_json::to_writer(out, value)?)
}

fn decode(e: impl std::error::Error + Send + Sync + 'static) -> sqlx::Error {
    sqlx::Error::Decode(Box::new(e))
}

/// Types both databases and JSON write the same.
macro_rules! plain {
    ($($T:ty),*) => {$(
        impl Bind for $T {
            type Postgres = Self;
            type Sqlite = Self;
            fn postgres(self) -> Self {
                self
            }
            fn sqlite(self) -> Self {
                self
            }
            fn json(self, out: &mut Vec<u8>) -> Result<(), BoxDynError> {
                write(&self, out)
            }
        }
        impl Fetch for $T {
            fn sqlite(row: &SqliteRow, column: &str) -> Result<Self, sqlx::Error> {
                // Left to itself, SQLite reads nothing as zero.
                row.try_get::<Option<Self>, _>(column)?.ok_or_else(|| sqlx::Error::ColumnDecode {
                    index: column.to_owned(),
                    source: Box::new(UnexpectedNullError),
                })
            }
            fn postgres(row: &PgRow, column: &str) -> Result<Self, sqlx::Error> {
                row.try_get(column)
            }
        }
    )*};
}
plain!(i64, bool, String);

/// Numbers no database has without a sign; none of ours comes near 2^63.
macro_rules! unsigned {
    ($($T:ty),*) => {$(
        impl Bind for $T {
            type Postgres = i64;
            type Sqlite = i64;
            fn postgres(self) -> i64 {
                i64::try_from(self).unwrap_or(i64::MAX)
            }
            fn sqlite(self) -> i64 {
                self.postgres()
            }
            fn json(self, out: &mut Vec<u8>) -> Result<(), BoxDynError> {
                write(&self, out)
            }
        }
        impl Fetch for $T {
            fn sqlite(row: &SqliteRow, column: &str) -> Result<Self, sqlx::Error> {
                <$T>::try_from(<i64 as Fetch>::sqlite(row, column)?).map_err(decode)
            }
            fn postgres(row: &PgRow, column: &str) -> Result<Self, sqlx::Error> {
                <$T>::try_from(<i64 as Fetch>::postgres(row, column)?).map_err(decode)
            }
        }
    )*};
}
unsigned!(u32, u64, usize);

impl Bind for &str {
    type Postgres = String;
    type Sqlite = String;
    fn postgres(self) -> String {
        self.to_owned()
    }
    fn sqlite(self) -> String {
        self.to_owned()
    }
    fn json(self, out: &mut Vec<u8>) -> Result<(), BoxDynError> {
        write(self, out)
    }
}

impl Bind for Bytes {
    type Postgres = Vec<u8>;
    type Sqlite = Vec<u8>;
    fn postgres(self) -> Vec<u8> {
        self.into()
    }
    fn sqlite(self) -> Vec<u8> {
        self.into()
    }
    /// # Errors
    /// They are no UTF-8, and so cannot be put into JSON: bind them one by one.
    fn json(self, out: &mut Vec<u8>) -> Result<(), BoxDynError> {
        write(std::str::from_utf8(&self)?, out)
    }
}

impl Fetch for Bytes {
    fn sqlite(row: &SqliteRow, column: &str) -> Result<Self, sqlx::Error> {
        row.try_get::<Vec<u8>, _>(column).map(Self::from)
    }
    fn postgres(row: &PgRow, column: &str) -> Result<Self, sqlx::Error> {
        row.try_get::<Vec<u8>, _>(column).map(Self::from)
    }
}

/// `uuid` in PostgreSQL; text in SQLite, where people read it.
impl Bind for Uuid {
    type Postgres = Self;
    type Sqlite = String;
    fn postgres(self) -> Self {
        self
    }
    fn sqlite(self) -> String {
        self.to_string()
    }
    fn json(self, out: &mut Vec<u8>) -> Result<(), BoxDynError> {
        write(&self, out)
    }
}

impl Fetch for Uuid {
    fn sqlite(row: &SqliteRow, column: &str) -> Result<Self, sqlx::Error> {
        row.try_get::<&str, _>(column)?.parse().map_err(decode)
    }
    fn postgres(row: &PgRow, column: &str) -> Result<Self, sqlx::Error> {
        row.try_get(column)
    }
}

/// `timestamptz` in PostgreSQL, milliseconds in SQLite.
impl Bind for Timestamp {
    type Postgres = OffsetDateTime;
    type Sqlite = i64;
    fn postgres(self) -> OffsetDateTime {
        let nanos = i128::from(self.as_millis()) * 1_000_000;
        // Beyond the year 9999 no moment is told from another.
        OffsetDateTime::from_unix_timestamp_nanos(nanos)
            .unwrap_or(time::macros::datetime!(9999-12-31 0:00 UTC))
    }
    fn sqlite(self) -> i64 {
        self.as_millis()
    }
    fn json(self, out: &mut Vec<u8>) -> Result<(), BoxDynError> {
        write(&self.as_millis(), out)
    }
}

impl Fetch for Timestamp {
    fn sqlite(row: &SqliteRow, column: &str) -> Result<Self, sqlx::Error> {
        <i64 as Fetch>::sqlite(row, column).map(Self::from_millis)
    }
    fn postgres(row: &PgRow, column: &str) -> Result<Self, sqlx::Error> {
        let at: OffsetDateTime = row.try_get(column)?;
        i64::try_from(at.unix_timestamp_nanos() / 1_000_000).map(Self::from_millis).map_err(decode)
    }
}

impl<T: Serialize + Send + Sync + 'static> Bind for Json<T> {
    type Postgres = SqlJson<T>;
    type Sqlite = SqlJson<T>;
    fn postgres(self) -> SqlJson<T> {
        SqlJson(self.0)
    }
    fn sqlite(self) -> SqlJson<T> {
        SqlJson(self.0)
    }
    fn json(self, out: &mut Vec<u8>) -> Result<(), BoxDynError> {
        // As a text within the text: what SQLite takes out of it is then the value's own JSON.
        write(&serde_json::to_string(&self.0)?, out)
    }
}

impl<T: DeserializeOwned + Send + Sync + 'static> Fetch for Json<T> {
    fn sqlite(row: &SqliteRow, column: &str) -> Result<Self, sqlx::Error> {
        row.try_get::<SqlJson<T>, _>(column).map(|j| Self(j.0))
    }
    fn postgres(row: &PgRow, column: &str) -> Result<Self, sqlx::Error> {
        row.try_get::<SqlJson<T>, _>(column).map(|j| Self(j.0))
    }
}

impl<T: Bind> Bind for Option<T>
where
    Option<T::Postgres>: for<'q> Encode<'q, Postgres> + Type<Postgres>,
    Option<T::Sqlite>: for<'q> Encode<'q, Sqlite> + Type<Sqlite>,
{
    type Postgres = Option<T::Postgres>;
    type Sqlite = Option<T::Sqlite>;
    fn postgres(self) -> Self::Postgres {
        self.map(T::postgres)
    }
    fn sqlite(self) -> Self::Sqlite {
        self.map(T::sqlite)
    }
    fn json(self, out: &mut Vec<u8>) -> Result<(), BoxDynError> {
        match self {
            Some(value) => value.json(out),
            None => write(&(), out),
        }
    }
}

impl<T: Fetch> Fetch for Option<T> {
    fn sqlite(row: &SqliteRow, column: &str) -> Result<Self, sqlx::Error> {
        if row.try_get_raw(column)?.is_null() { Ok(None) } else { T::sqlite(row, column).map(Some) }
    }
    fn postgres(row: &PgRow, column: &str) -> Result<Self, sqlx::Error> {
        if row.try_get_raw(column)?.is_null() { Ok(None) } else { T::postgres(row, column).map(Some) }
    }
}

/// A row of many, for [`Query::rows`]: a tuple of values.
pub trait Rows: Sized {
    /// Its values, separated by commas.
    fn json(self, out: &mut Vec<u8>) -> Result<(), BoxDynError>;
    /// One array per column.
    fn columns(rows: impl IntoIterator<Item = Self>, arguments: &mut PgArguments) -> Result<(), BoxDynError>;
}

macro_rules! rows {
    ($($T:ident $i:tt),*) => {
        impl<$($T: Bind),*> Rows for ($($T,)*) {
            fn json(self, out: &mut Vec<u8>) -> Result<(), BoxDynError> {
                $(
                    if $i > 0 {
                        out.push(b',');
                    }
                    self.$i.json(out)?;
                )*
                Ok(())
            }
            fn columns(rows: impl IntoIterator<Item = Self>, arguments: &mut PgArguments) -> Result<(), BoxDynError> {
                let mut columns = ($(Vec::<$T::Postgres>::new(),)*);
                for row in rows {
                    $(columns.$i.push(row.$i.postgres());)*
                }
                $(arguments.add(columns.$i)?;)*
                Ok(())
            }
        }
    };
}
rows!(A 0);
rows!(A 0, B 1);
rows!(A 0, B 1, C 2);
rows!(A 0, B 1, C 2, D 3);
rows!(A 0, B 1, C 2, D 3, E 4);
rows!(A 0, B 1, C 2, D 3, E 4, F 5);
rows!(A 0, B 1, C 2, D 3, E 4, F 5, G 6);
rows!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7);
rows!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8);
rows!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9);
rows!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9, K 10);
rows!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9, K 10, L 11);
rows!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9, K 10, L 11, M 12);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_become_what_each_database_knows() {
        let text = "UPDATE t SET a = r.a FROM {$2: id, a bytes} WHERE t.id = r.id {lock}";
        assert_eq!(
            expand(text, Dialect::Postgres),
            "UPDATE t SET a = r.a FROM unnest($2, $3) AS r(id, a) WHERE t.id = r.id FOR UPDATE"
        );
        assert_eq!(
            expand(text, Dialect::Sqlite),
            "UPDATE t SET a = r.a FROM (SELECT value ->> 0 AS id, CAST(value ->> 1 AS BLOB) AS a FROM json_each($2)) AS r \
             WHERE t.id = r.id "
        );
        assert_eq!(expand("SELECT 1", Dialect::Sqlite), "SELECT 1");
    }
}
