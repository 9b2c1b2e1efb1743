//! Group commit: concurrent requests share one transaction, and with it one `fsync`.

use std::future::Future;
use std::sync::Arc;

use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use super::{Db, DbError, Tx};

/// Requests waiting for their turn; beyond it callers wait.
const QUEUE: usize = 4096;

/// A group that meets another replica's changes so often in a row is given up.
const CONFLICTS: u32 = 3;

type Item<I, O> = (I, oneshot::Sender<Result<O, GroupError>>);

/// The whole group failed; nothing of it took effect.
#[derive(Clone, Debug, Error)]
pub enum GroupError {
    /// The transaction failed.
    #[error("database")]
    Db(#[source] Arc<DbError>),
    /// The service is stopping.
    #[error("the service is stopping")]
    Closed,
}

/// Runs requests of one kind in groups: whatever queues up while one group commits is the next group.
///
/// Alone, a request waits for nobody. The work function gets all requests of a group and answers each in order; its
/// statements should not grow with the group.
#[derive(Debug)]
pub struct GroupCommit<I, O> {
    queue: mpsc::Sender<Item<I, O>>,
}

impl<I, O> Clone for GroupCommit<I, O> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone() }
    }
}

impl<I: Send + Sync + 'static, O: Send + 'static> GroupCommit<I, O> {
    /// Starts the task that commits groups of up to `max` requests; it ends when the last handle is dropped.
    ///
    /// `work` is a plain async function over the transaction and the group: `async fn(&C, &mut Tx, &[I]) -> Result<Vec<O>, DbError>`,
    /// given boxed because it borrows.
    pub fn start<W>(db: Db, max: usize, work: W) -> Self
    where
        W: for<'a> Work<'a, I, O> + Send + Sync + 'static,
    {
        let (queue, mut requests) = mpsc::channel::<Item<I, O>>(QUEUE);
        tokio::spawn(async move {
            let mut group = Vec::with_capacity(max);
            while requests.recv_many(&mut group, max).await > 0 {
                let (inputs, replies): (Vec<I>, Vec<_>) = group.drain(..).unzip();
                match commit(&db, &work, &inputs).await {
                    Ok(outputs) => {
                        for (reply, output) in replies.into_iter().zip(outputs) {
                            let _ = reply.send(Ok(output));
                        }
                    }
                    Err(e) => {
                        let e = GroupError::Db(Arc::new(e));
                        for reply in replies {
                            let _ = reply.send(Err(e.clone()));
                        }
                    }
                }
            }
        });
        Self { queue }
    }

    /// The request's answer, once its group is committed.
    pub async fn run(&self, input: I) -> Result<O, GroupError> {
        let (reply, answer) = oneshot::channel();
        self.queue.send((input, reply)).await.map_err(|_| GroupError::Closed)?;
        answer.await.map_err(|_| GroupError::Closed)?
    }
}

async fn commit<I, O, W>(db: &Db, work: &W, inputs: &[I]) -> Result<Vec<O>, DbError>
where
    W: for<'a> Work<'a, I, O>,
{
    let mut conflicts = 0;
    loop {
        let mut tx = db.begin().await?;
        match work.call(&mut tx, inputs).await {
            Ok(outputs) => {
                tx.commit().await?;
                return Ok(outputs);
            }
            // Run again, it sees what the other replica has done.
            Err(DbError::Conflict(_)) if conflicts < CONFLICTS => {
                conflicts += 1;
                tx.rollback().await;
            }
            Err(e) => {
                tx.rollback().await;
                return Err(e);
            }
        }
    }
}

/// What [`GroupCommit`] runs; implemented by every suitable closure.
pub trait Work<'a, I: 'a, O> {
    /// The future it returns.
    type Future: Future<Output = Result<Vec<O>, DbError>> + Send + 'a;
    /// Runs it on one group.
    fn call(&self, tx: &'a mut Tx, group: &'a [I]) -> Self::Future;
}

impl<'a, I: 'a, O, F, Fut> Work<'a, I, O> for F
where
    F: Fn(&'a mut Tx, &'a [I]) -> Fut,
    Fut: Future<Output = Result<Vec<O>, DbError>> + Send + 'a,
{
    type Future = Fut;
    fn call(&self, tx: &'a mut Tx, group: &'a [I]) -> Fut {
        self(tx, group)
    }
}
