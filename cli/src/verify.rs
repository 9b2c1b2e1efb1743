//! `consign verify`: is every order where it should be, and every cent and piece accounted for? Reads the databases themselves, SQLite files
//! or copies of what is in PostgreSQL, on a live system too: what is merely under way is looked at again until it settles or the time is up.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Duration;

use clap::Args;
use comfy_table::Table;
use consign::handler::BoxError;
use serde::Serialize;
use sqlx::sqlite::{SqliteConnectOptions, SqliteRow};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Row, SqliteConnection};
use tokio::time::Instant;

use crate::output::Format;
use crate::snapshot::{self, Databases};

#[derive(Clone, Debug, Args)]
pub struct Options {
    #[command(flatten)]
    databases: Databases,
    /// Look again for so many seconds before what is under way counts as a violation.
    #[arg(long, default_value_t = 15)]
    pub settle: u64,
    /// Orders may be open so many seconds past their deadline.
    #[arg(long, default_value_t = 60)]
    pub grace: u64,
}

/// One rule: `count` says how much it looked at, `violations` selects `subject` (an order where there is one) and `detail` of what
/// breaks it. `:late` stands for the moment before which a deadline must have been dealt with.
struct Check {
    name: &'static str,
    /// Holds at every moment, so that a violation need not be looked at twice.
    definite: bool,
    /// Looks at the simulated gateway's ledger; where the gateway is another, it cannot be made.
    ledger: bool,
    rule: &'static str,
    count: &'static str,
    violations: &'static [&'static str],
}

const CHECKS: &[Check] = &[
    Check {
        name: "orders end",
        definite: false,
        ledger: false,
        rule: "every order is in a final state, or younger than its deadline",
        count: "SELECT COUNT(*) FROM ord.orders",
        violations: &[
            "SELECT id AS subject, status || ' past its deadline' AS detail FROM ord.orders
             WHERE status IN ('pending', 'reserved') AND deadline < :late",
        ],
    },
    Check {
        name: "totals",
        definite: true,
        ledger: false,
        rule: "each total is the sum of its lines",
        count: "SELECT COUNT(*) FROM ord.orders",
        violations: &[
            "SELECT id AS subject, 'total ' || total || ' is not the sum of its lines' AS detail FROM ord.orders
             WHERE total <> (SELECT SUM((value ->> 'quantity') * (value ->> 'unit_price')) FROM json_each(items))",
        ],
    },
    Check {
        name: "charged once",
        definite: false,
        ledger: true,
        rule: "every order is charged exactly once or not at all, and the gateway's ledger agrees",
        count: "SELECT COUNT(*) FROM gate.charges",
        violations: &[
            "SELECT p.order_id AS subject, 'paid according to us, not according to the gateway' AS detail
             FROM pay.payments p LEFT JOIN gate.charges c ON c.key = p.payment_id
             WHERE p.status IN ('succeeded', 'refunding', 'refunded')
               AND (c.key IS NULL OR c.declined IS NOT NULL OR c.amount <> p.amount OR c.currency <> p.currency)",
            "SELECT COALESCE(p.order_id, 'charge ' || c.key) AS subject,
                 'charged by the gateway, ' || COALESCE(p.status, 'unknown') || ' to us' AS detail
             FROM gate.charges c LEFT JOIN pay.payments p ON p.payment_id = c.key
             WHERE c.declined IS NULL AND (p.status IS NULL OR p.status NOT IN ('succeeded', 'refunding', 'refunded'))",
        ],
    },
    Check {
        name: "payments fit orders",
        definite: false,
        ledger: false,
        rule: "confirmed orders are paid in full, cancelled ones not at all or refunded",
        count: "SELECT COUNT(*) FROM pay.payments",
        violations: &[
            "SELECT o.id AS subject, 'confirmed, but its payment is ' || COALESCE(p.status, 'missing') AS detail
             FROM ord.orders o LEFT JOIN pay.payments p ON p.order_id = o.id
             WHERE o.status = 'confirmed' AND (p.status IS NULL OR p.status <> 'succeeded' OR p.amount <> o.total
                OR p.currency <> o.currency OR p.payment_id <> o.payment_id)",
            "SELECT p.order_id AS subject, 'paid, but the order is ' || COALESCE(o.status, 'missing') AS detail
             FROM pay.payments p LEFT JOIN ord.orders o ON o.id = p.order_id
             WHERE p.status IN ('succeeded', 'refunding') AND (o.status IS NULL OR o.status <> 'confirmed')",
        ],
    },
    Check {
        name: "refunds",
        definite: false,
        ledger: true,
        rule: "every refund is the gateway's too, of the same amount, none of more than was charged",
        count: "SELECT COUNT(*) FROM gate.refunds",
        violations: &[
            "SELECT r.order_id AS subject, 'refunded according to us, not according to the gateway' AS detail
             FROM pay.refunds r LEFT JOIN gate.refunds g ON g.key = 'refund-' || r.refund_id
             WHERE r.status = 'done' AND (g.key IS NULL OR g.amount <> r.amount)",
            "SELECT COALESCE(r.order_id, g.key) AS subject, 'refunded by the gateway, ' || COALESCE(r.status, 'unknown') || ' to us' AS detail
             FROM gate.refunds g LEFT JOIN pay.refunds r ON g.key = 'refund-' || r.refund_id
             WHERE r.status IS NULL OR r.status <> 'done'",
            "SELECT c.key AS subject, 'refunded ' || g.amount || ' of ' || c.amount AS detail
             FROM gate.charges c JOIN (SELECT charge_key, SUM(amount) AS amount FROM gate.refunds GROUP BY 1) g ON g.charge_key = c.key
             WHERE g.amount > c.amount OR c.declined IS NOT NULL",
        ],
    },
    Check {
        name: "refunds end",
        definite: false,
        ledger: false,
        rule: "order and payment agree on every refund, and each comes to an end",
        count: "SELECT COUNT(*) FROM pay.refunds",
        violations: &[
            "SELECT o.order_id AS subject, 'refund ' || o.id || ' is ' || o.status || ' to order, ' || COALESCE(p.status, 'unknown') || ' to payment' AS detail
             FROM ord.refunds o LEFT JOIN pay.refunds p ON p.refund_id = o.id WHERE p.status IS NULL OR p.status <> o.status OR p.amount <> o.amount",
            "SELECT order_id AS subject, 'refund ' || refund_id || ' is still pending' AS detail FROM pay.refunds WHERE status = 'pending'",
            "SELECT p.order_id AS subject, 'given back ' || p.refunded || ', but its refunds add up to ' || COALESCE(SUM(r.amount), 0) AS detail
             FROM pay.payments p LEFT JOIN pay.refunds r ON r.order_id = p.order_id AND r.status = 'done'
             WHERE p.refunded > 0 OR r.refund_id IS NOT NULL GROUP BY p.order_id HAVING p.refunded <> COALESCE(SUM(r.amount), 0)",
            "SELECT o.id AS subject, 'given back ' || o.refunded || ', but its refunds add up to ' || COALESCE(SUM(r.amount), 0) AS detail
             FROM ord.orders o LEFT JOIN ord.refunds r ON r.order_id = o.id AND r.status = 'done'
             WHERE o.refunded > 0 OR r.id IS NOT NULL GROUP BY o.id HAVING o.refunded <> COALESCE(SUM(r.amount), 0)",
        ],
    },
    Check {
        name: "returns",
        definite: false,
        ledger: false,
        rule: "what is refunded came back, once, to the shelf or written off as was said",
        count: "SELECT COUNT(*) FROM inv.returns",
        violations: &[
            "SELECT o.order_id AS subject, 'refund ' || o.id || ' is done, but nothing came back' AS detail
             FROM ord.refunds o LEFT JOIN inv.returns r ON r.refund_id = o.id
             WHERE o.status = 'done' AND (r.refund_id IS NULL OR r.restocked <> o.restock
                OR (SELECT SUM(value) FROM json_each(r.lines)) <> (SELECT SUM(value ->> 'quantity') FROM json_each(o.lines)))",
            "SELECT r.order_id AS subject, 'came back, but refund ' || r.refund_id || ' is ' || COALESCE(o.status, 'unknown') AS detail
             FROM inv.returns r LEFT JOIN ord.refunds o ON r.refund_id = o.id WHERE o.status IS NULL OR o.status <> 'done'",
        ],
    },
    Check {
        name: "money",
        definite: true,
        ledger: true,
        rule: "payments - refunds = amounts of confirmed orders less what was refunded, per currency to the minor unit",
        count: "SELECT COUNT(DISTINCT currency) FROM ord.orders",
        violations: &[
            "WITH asked AS (SELECT g.charge_key, g.key, g.amount, o.order_id FROM gate.refunds g JOIN ord.refunds o ON g.key = 'refund-' || o.id),
                  confirmed AS (SELECT currency, SUM(total - COALESCE((SELECT SUM(a.amount) FROM asked a WHERE a.order_id = orders.id), 0)) AS amount
                            FROM ord.orders WHERE status = 'confirmed' GROUP BY 1),
                  -- Of orders that have ended; what is still under way is nobody's yet.
                  taken AS (SELECT c.currency, SUM(c.amount - COALESCE((SELECT SUM(r.amount) FROM gate.refunds r WHERE r.charge_key = c.key
                                AND (r.key = 'refund-' || c.key OR r.key IN (SELECT key FROM asked))), 0)) AS amount
                            FROM gate.charges c LEFT JOIN pay.payments p ON p.payment_id = c.key LEFT JOIN ord.orders o ON o.id = p.order_id
                            WHERE c.declined IS NULL AND (o.id IS NULL OR o.status = 'confirmed' OR p.status = 'refunded') GROUP BY 1),
                  both AS (SELECT currency FROM confirmed UNION SELECT currency FROM taken)
             SELECT currency AS subject, 'taken ' || COALESCE(t.amount, 0) || ', confirmed ' || COALESCE(c.amount, 0) AS detail
             FROM both LEFT JOIN taken t USING (currency) LEFT JOIN confirmed c USING (currency)
             WHERE COALESCE(t.amount, 0) <> COALESCE(c.amount, 0)",
        ],
    },
    Check {
        name: "stock",
        definite: true,
        ledger: false,
        rule: "on hand + sold = received, and what is reserved and sold is what orders hold",
        count: "SELECT COUNT(*) FROM inv.products",
        violations: &[
            "SELECT id AS subject, 'on hand ' || on_hand || ' + sold ' || sold || ' <> received ' || received AS detail
             FROM inv.products WHERE on_hand + sold <> received OR on_hand < reserved OR reserved < 0",
            "SELECT id AS subject, 'received ' || received || ', but movements add up to ' || COALESCE(m.total, 0) AS detail
             FROM inv.products LEFT JOIN (SELECT product_id, SUM(delta) AS total FROM inv.stock_movements GROUP BY 1) m
               ON m.product_id = id WHERE received <> COALESCE(m.total, 0)",
            "WITH held AS (SELECT l.key AS product_id,
                   SUM(CASE r.status WHEN 'reserved' THEN l.value ELSE 0 END) AS reserved,
                   SUM(CASE r.status WHEN 'committed' THEN l.value ELSE 0 END) AS sold
                 FROM inv.reservations r, json_each(r.lines) l WHERE r.status IN ('reserved', 'committed') GROUP BY 1),
                  back AS (SELECT l.key AS product_id, SUM(l.value) AS quantity FROM inv.returns r, json_each(r.lines) l GROUP BY 1)
             SELECT id AS subject, 'reserved ' || p.reserved || ' and sold ' || p.sold || ', but orders hold '
                 || COALESCE(h.reserved, 0) || ', bought ' || COALESCE(h.sold, 0) || ' and gave back ' || COALESCE(b.quantity, 0) AS detail
             FROM inv.products p LEFT JOIN held h ON h.product_id = p.id LEFT JOIN back b ON b.product_id = p.id
             WHERE p.reserved <> COALESCE(h.reserved, 0) OR p.sold <> COALESCE(h.sold, 0) - COALESCE(b.quantity, 0)",
        ],
    },
    Check {
        name: "reservations",
        definite: false,
        ledger: false,
        rule: "open orders hold their stock, confirmed ones bought it, cancelled ones hold none",
        count: "SELECT COUNT(*) FROM inv.reservations",
        violations: &[
            "SELECT o.id AS subject, o.status || ', but its reservation is ' || COALESCE(r.status, 'missing') AS detail
             FROM ord.orders o LEFT JOIN inv.reservations r ON r.order_id = o.id
             WHERE (o.status = 'confirmed' AND (r.status IS NULL OR r.status <> 'committed'))
                OR (o.status = 'reserved' AND (r.status IS NULL OR r.status <> 'reserved'))
                OR (o.status = 'cancelled' AND r.status IN ('reserved', 'committed'))",
            "SELECT r.order_id AS subject, 'stock is ' || r.status || ' for an order that does not exist' AS detail
             FROM inv.reservations r LEFT JOIN ord.orders o ON o.id = r.order_id
             WHERE o.id IS NULL AND r.status IN ('reserved', 'committed')",
            "SELECT o.id AS subject, 'bought other quantities than ordered' AS detail
             FROM ord.orders o JOIN inv.reservations r ON r.order_id = o.id
             WHERE o.status = 'confirmed' AND (SELECT SUM(value ->> 'quantity') FROM json_each(o.items))
                <> (SELECT SUM(value) FROM json_each(r.lines))",
        ],
    },
    Check {
        name: "timeline",
        definite: true,
        ledger: false,
        rule: "each order's timeline is whole and ends as the order did",
        count: "SELECT COUNT(*) FROM ord.timeline",
        violations: &[
            "SELECT o.id AS subject, 'version ' || o.version || ', but ' || COALESCE(t.n, 0) || ' entries' AS detail
             FROM ord.orders o LEFT JOIN (SELECT order_id, COUNT(*) AS n FROM ord.timeline GROUP BY 1) t ON t.order_id = o.id
             WHERE COALESCE(t.n, 0) <> o.version",
        ],
    },
    Check {
        name: "dead letters",
        definite: true,
        ledger: false,
        rule: "every dead letter was redriven or discarded",
        count: "SELECT (SELECT COUNT(*) FROM ord.dead_letters) + (SELECT COUNT(*) FROM inv.dead_letters) + (SELECT COUNT(*) FROM pay.dead_letters)",
        violations: &[
            "SELECT consumer || ' ' || id AS subject, reason || ': ' || error AS detail FROM ord.dead_letters WHERE status IN ('open', 'queued')",
            "SELECT consumer || ' ' || id AS subject, reason || ': ' || error AS detail FROM inv.dead_letters WHERE status IN ('open', 'queued')",
            "SELECT consumer || ' ' || id AS subject, reason || ': ' || error AS detail FROM pay.dead_letters WHERE status IN ('open', 'queued')",
        ],
    },
    Check {
        name: "outboxes",
        definite: false,
        ledger: false,
        rule: "everything recorded was published",
        count: "SELECT (SELECT COUNT(*) FROM ord.outbox) + (SELECT COUNT(*) FROM inv.outbox) + (SELECT COUNT(*) FROM pay.outbox)",
        violations: &[
            "SELECT subject || ' ' || event_id AS subject, 'not published' AS detail FROM ord.outbox_pending JOIN ord.outbox USING (seq)",
            "SELECT subject || ' ' || event_id AS subject, 'not published' AS detail FROM inv.outbox_pending JOIN inv.outbox USING (seq)",
            "SELECT subject || ' ' || event_id AS subject, 'not published' AS detail FROM pay.outbox_pending JOIN pay.outbox USING (seq)",
        ],
    },
];

/// Who handles what, for the comparison of outboxes and inboxes: consumer, its database, the publisher's, the events, in
/// whatever versions.
const DELIVERIES: &[(&str, &str, &str, &[&str])] = &[
    (
        "inventory-orders",
        "inv",
        "ord",
        &[
            "orders.created",
            "orders.confirmed",
            "orders.cancelled",
            "orders.deadline_extended",
            "orders.refunded",
        ],
    ),
    (
        "payment-orders",
        "pay",
        "ord",
        &["orders.cancelled", "orders.deadline_extended", "orders.refund_requested"],
    ),
    ("payment-inventory", "pay", "inv", &["inventory.reserved"]),
    ("order-inventory", "ord", "inv", &["inventory.reserved", "inventory.rejected"]),
    (
        "order-payments",
        "ord",
        "pay",
        &[
            "payments.succeeded",
            "payments.failed",
            "payments.refunded",
            "payments.refund_rejected",
            "payments.gateway_unavailable",
        ],
    ),
];

/// One violation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Violation {
    check: String,
    subject: String,
    detail: String,
}

#[derive(Debug, Serialize)]
struct Checked {
    check: String,
    rule: String,
    /// None if there was nothing to look at: the gateway's ledger is its own.
    looked_at: Option<i64>,
    violations: usize,
}

/// Whether all is well; prints what was checked.
pub async fn run(options: Options, data_dir: &Path, format: Format) -> Result<bool, BoxError> {
    let settle = Duration::from_secs(options.settle);
    let started = Instant::now();
    let mut since: HashMap<(String, String), Instant> = HashMap::new();
    let (mut checked, mut violations) = loop {
        let (checked, violations) = match options.databases.urls() {
            None => look_at(data_dir, &options).await?,
            Some(urls) => {
                let copy = tempfile::tempdir()?;
                snapshot::take(urls, copy.path()).await?;
                look_at(copy.path(), &options).await?
            }
        };
        let now = Instant::now();
        let key = |v: &Violation| (v.check.clone(), v.subject.clone());
        let before = std::mem::take(&mut since);
        since = violations.iter().map(|v| (key(v), before.get(&key(v)).copied().unwrap_or(now))).collect();
        // On a live system there is always something under way; what counts is what stays.
        let stays = |v: &Violation| {
            let definite = CHECKS.iter().any(|c| c.name == v.check && c.definite);
            definite || since.get(&key(v)).is_some_and(|t| now - *t >= settle)
        };
        if violations.iter().all(stays) || started.elapsed() >= settle * 2 {
            break (checked, violations.into_iter().filter(stays).collect::<Vec<_>>());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    for c in &mut checked {
        c.violations = violations.iter().filter(|v| v.check == c.check).count();
    }
    violations.sort_by(|a, b| (&a.check, &a.subject).cmp(&(&b.check, &b.subject)));
    print(&checked, &violations, format)?;
    Ok(violations.is_empty())
}

async fn look_at(dir: &Path, options: &Options) -> Result<(Vec<Checked>, Vec<Violation>), BoxError> {
    let mut conn = open(dir).await?;
    let seen = look(&mut conn, options).await?;
    conn.close().await?;
    Ok(seen)
}

async fn open(data_dir: &Path) -> Result<SqliteConnection, BoxError> {
    let mut conn = SqliteConnectOptions::new().in_memory(true).disable_statement_logging().connect().await?;
    for (name, file) in
        [("ord", "order.db"), ("inv", "inventory.db"), ("pay", "payment.db"), ("gate", "gateway.db")]
    {
        let path = data_dir.join(file);
        if name == "gate" && !path.exists() {
            // Another gateway keeps its books itself.
            continue;
        }
        if !path.exists() {
            return Err(
                format!("{} is not there; --data-dir names the data directory", path.display()).into()
            );
        }
        let uri =
            format!("file:{}?mode=ro", path.display().to_string().replace('%', "%25").replace('?', "%3f"));
        sqlx::query(AssertSqlSafe(format!("ATTACH DATABASE ? AS {name}")))
            .bind(uri)
            .execute(&mut conn)
            .await?;
    }
    sqlx::query("PRAGMA temp_store = memory").execute(&mut conn).await?;
    Ok(conn)
}

#[expect(clippy::cast_possible_wrap, reason = "seconds given by a person")]
async fn look(
    conn: &mut SqliteConnection,
    options: &Options,
) -> Result<(Vec<Checked>, Vec<Violation>), BoxError> {
    let now = consign::Clock::system().now().as_millis();
    let late = (now - options.grace as i64 * 1000).to_string();
    let mut checked = Vec::new();
    let mut violations = Vec::new();
    let mut tx = conn.begin().await?;
    let conn = &mut *tx;
    // The snapshots are taken in this order: what the later ones have to show for an earlier one's state is there already.
    for db in ["ord", "inv", "pay"] {
        sqlx::query(AssertSqlSafe(format!("SELECT 1 FROM {db}.inbox LIMIT 1"))).execute(&mut *conn).await?;
    }
    let attached: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM pragma_database_list WHERE name = 'gate'")
        .fetch_one(&mut *conn)
        .await?;
    let ledger = attached > 0;
    if ledger {
        sqlx::query("SELECT 1 FROM gate.charges LIMIT 1").execute(&mut *conn).await?;
    }
    for check in CHECKS {
        if check.ledger && !ledger {
            checked.push(Checked {
                check: check.name.into(),
                rule: check.rule.into(),
                looked_at: None,
                violations: 0,
            });
            continue;
        }
        let looked_at: i64 = sqlx::query_scalar(check.count).fetch_one(&mut *conn).await?;
        for sql in check.violations {
            let sql = sql.replace(":late", &late);
            violations.extend(select(conn, check.name, sql).await?);
        }
        checked.push(Checked {
            check: check.name.into(),
            rule: check.rule.into(),
            looked_at: Some(looked_at),
            violations: 0,
        });
    }
    let (mut looked_at, name) = (0, "inboxes");
    for (consumer, inbox, outbox, events) in DELIVERIES {
        let wanted: Vec<String> = events.iter().map(|e| format!("o.subject LIKE '{e}.v%'")).collect();
        let wanted = wanted.join(" OR ");
        let count = format!("SELECT COUNT(*) FROM {outbox}.outbox o WHERE {wanted}");
        looked_at += sqlx::query_scalar::<_, i64>(AssertSqlSafe(count)).fetch_one(&mut *conn).await?;
        let unhandled = format!(
            "SELECT o.subject || ' ' || o.event_id AS subject, 'not handled by {consumer}' AS detail FROM {outbox}.outbox o
             LEFT JOIN {inbox}.inbox i ON i.consumer = '{consumer}' AND i.event_id = o.event_id
             WHERE ({wanted}) AND i.event_id IS NULL"
        );
        violations.extend(select(conn, name, unhandled).await?);
        let unheard_of = format!(
            "SELECT i.event_id AS subject, 'handled by {consumer}, but never published' AS detail FROM {inbox}.inbox i
             WHERE i.consumer = '{consumer}' AND i.event_id >= (SELECT MIN(event_id) FROM {outbox}.outbox)
               AND i.event_id NOT IN (SELECT o.event_id FROM {outbox}.outbox o)
               AND i.event_id NOT IN (SELECT d.event_id FROM {inbox}.dead_letters d WHERE d.event_id IS NOT NULL)"
        );
        violations.extend(select(conn, name, unheard_of).await?);
    }
    let rule = "every published event was handled by each of its consumers, and nothing else was";
    checked.push(Checked {
        check: name.into(),
        rule: rule.into(),
        looked_at: Some(looked_at),
        violations: 0,
    });
    tx.rollback().await?;
    Ok((checked, violations))
}

async fn select(
    conn: &mut SqliteConnection,
    check: &str,
    sql: String,
) -> Result<Vec<Violation>, sqlx::Error> {
    let rows = sqlx::query(AssertSqlSafe(sql)).fetch_all(conn).await?;
    let read = |r: &SqliteRow| {
        Ok(Violation {
            check: check.to_owned(),
            subject: r.try_get("subject")?,
            detail: r.try_get("detail")?,
        })
    };
    rows.iter().map(read).collect()
}

/// So many violations of one check are written out; the count says how many there are.
const SHOWN: usize = 20;

fn print(checked: &[Checked], violations: &[Violation], format: Format) -> Result<(), BoxError> {
    if format == Format::Json {
        let report =
            serde_json::json!({"clean": violations.is_empty(), "checks": checked, "violations": violations});
        outln!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    let mut table = Table::new();
    table.set_header(["check", "rule", "looked at", "violations"]);
    for c in checked {
        table.add_row([
            c.check.clone(),
            c.rule.clone(),
            c.looked_at.map_or_else(|| "the gateway's own".into(), |n| n.to_string()),
            c.violations.to_string(),
        ]);
    }
    outln!("{table}");
    let mut shown: BTreeMap<&str, usize> = BTreeMap::new();
    for v in violations {
        let n = shown.entry(&v.check).or_default();
        *n += 1;
        if *n <= SHOWN {
            outln!("{}: {}: {}", v.check, v.subject, v.detail);
        }
    }
    for (check, n) in shown.into_iter().filter(|(_, n)| *n > SHOWN) {
        outln!("{check}: … and {} more", n - SHOWN);
    }
    outln!("{}", if violations.is_empty() { "clean" } else { "NOT clean" });
    Ok(())
}
