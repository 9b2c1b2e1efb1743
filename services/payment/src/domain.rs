//! A payment's rules, without a clock, a database or a gateway.

/// Where a payment stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Intended; perhaps charged, perhaps not yet.
    Pending,
    /// Charged; some of it may have been given back.
    Succeeded,
    /// Not charged, and never will be.
    Failed,
    /// Charged, but its order is cancelled: to be given back.
    Refunding,
    /// Given back because its order was cancelled.
    Refunded,
    /// Its order was cancelled before it was heard of: it must not be charged.
    Forbidden,
}

impl Status {
    const ALL: [Self; 6] =
        [Self::Pending, Self::Succeeded, Self::Failed, Self::Refunding, Self::Refunded, Self::Forbidden];

    /// The word in rows and answers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Refunding => "refunding",
            Self::Refunded => "refunded",
            Self::Forbidden => "forbidden",
        }
    }

    /// From that word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.as_str() == word)
    }
}

/// What is known of a payment when something happens. Amounts are in minor units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Where it stands.
    pub status: Status,
    /// Its order was cancelled.
    pub cancelled: bool,
    /// What it is of.
    pub amount: i64,
    /// What is being given back.
    pub refunding: i64,
    /// What was given back.
    pub refunded: i64,
}

impl State {
    const fn new(status: Status, amount: i64) -> Self {
        Self { status, cancelled: false, amount, refunding: 0, refunded: 0 }
    }

    /// What could still be given back.
    pub const fn refundable(&self) -> i64 {
        self.amount - self.refunding - self.refunded
    }
}

/// What can happen to a payment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Stock is reserved: charge the amount.
    Reserved {
        /// How much.
        amount: i64,
    },
    /// The order is cancelled.
    OrderCancelled,
    /// The order has more time.
    DeadlineExtended,
    /// The gateway has a reference for it, and nothing is charged yet.
    Prepared,
    /// The gateway charged.
    Charged,
    /// The gateway declined, or the charge was forbidden.
    NotCharged,
    /// A refund that was not heard of before is asked for.
    RefundRequested {
        /// How much.
        amount: i64,
    },
    /// The gateway made a refund that was under way.
    RefundDone {
        /// Of this much.
        amount: i64,
    },
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// A new payment, to be charged.
    Intend {
        /// How much.
        amount: i64,
    },
    /// A tombstone.
    Forbid,
    /// The charge under way must not happen, or must be refunded if it did.
    MarkCancelled,
    /// It may be charged for longer.
    Extend,
    /// On with the charge.
    Proceed,
    /// `payments.succeeded` follows.
    Succeed,
    /// `payments.succeeded` follows, and a refund of everything.
    SucceedAndRefund,
    /// `payments.failed` follows.
    Fail,
    /// A refund of all that is left follows, for the order is cancelled.
    RefundRest,
    /// A refund follows.
    Refund {
        /// How much.
        amount: i64,
    },
    /// `payments.refund_rejected` follows, for this reason.
    RejectRefund(&'static str),
    /// `payments.refunded` follows.
    FinishRefund {
        /// How much.
        amount: i64,
    },
    /// It is too early to tell: what this follows from has not arrived.
    NotYet,
    /// Nothing: known already.
    Ignore,
}

/// What a payment makes of an input, in whatever order things arrive. That a refund is heard of only once is the caller's promise.
pub fn decide(state: Option<State>, input: Input) -> Decision {
    let Some(state) = state else {
        return match input {
            Input::Reserved { amount } => Decision::Intend { amount },
            Input::OrderCancelled => Decision::Forbid,
            Input::RefundRequested { .. } => Decision::NotYet,
            _ => Decision::Ignore,
        };
    };
    match (state.status, input) {
        (Status::Pending, Input::OrderCancelled) if !state.cancelled => Decision::MarkCancelled,
        (Status::Pending, Input::DeadlineExtended) if !state.cancelled => Decision::Extend,
        (Status::Pending, Input::Prepared) => Decision::Proceed,
        (Status::Pending, Input::Charged) if state.cancelled => Decision::SucceedAndRefund,
        (Status::Pending, Input::Charged) => Decision::Succeed,
        (Status::Pending, Input::NotCharged) => Decision::Fail,
        (Status::Succeeded, Input::OrderCancelled) => Decision::RefundRest,
        (Status::Pending, Input::RefundRequested { .. }) => Decision::NotYet,
        (Status::Succeeded, Input::RefundRequested { amount })
            if (1..=state.refundable()).contains(&amount) =>
        {
            Decision::Refund { amount }
        }
        (Status::Succeeded, Input::RefundRequested { .. }) => Decision::RejectRefund("more than was paid"),
        (Status::Failed | Status::Forbidden, Input::RefundRequested { .. }) => {
            Decision::RejectRefund("nothing was paid")
        }
        (Status::Refunding | Status::Refunded, Input::RefundRequested { .. }) => {
            Decision::RejectRefund("all of it is given back already")
        }
        (Status::Succeeded | Status::Refunding, Input::RefundDone { amount })
            if amount <= state.refunding =>
        {
            Decision::FinishRefund { amount }
        }
        _ => Decision::Ignore,
    }
}

/// The state after a decision.
pub fn apply(state: Option<State>, decision: Decision) -> Option<State> {
    match (state, decision) {
        (None, Decision::Intend { amount }) => Some(State::new(Status::Pending, amount)),
        (None, Decision::Forbid) => Some(State { cancelled: true, ..State::new(Status::Forbidden, 0) }),
        (None, _) => None,
        (Some(state), decision) => Some(next(state, decision)),
    }
}

fn next(state: State, decision: Decision) -> State {
    let to = |status| State { status, ..state };
    match decision {
        Decision::MarkCancelled => State { cancelled: true, ..state },
        Decision::Succeed => to(Status::Succeeded),
        Decision::Fail => to(Status::Failed),
        Decision::SucceedAndRefund | Decision::RefundRest => State {
            status: if state.refundable() + state.refunding > 0 {
                Status::Refunding
            } else {
                Status::Refunded
            },
            cancelled: true,
            refunding: state.refunding + state.refundable(),
            ..state
        },
        Decision::Refund { amount } => State { refunding: state.refunding + amount, ..state },
        Decision::FinishRefund { amount } => {
            let (refunding, refunded) = (state.refunding - amount, state.refunded + amount);
            let ended = state.status == Status::Refunding && refunding == 0;
            State {
                status: if ended { Status::Refunded } else { state.status },
                refunding,
                refunded,
                ..state
            }
        }
        Decision::Extend
        | Decision::Proceed
        | Decision::RejectRefund(_)
        | Decision::NotYet
        | Decision::Ignore
        | Decision::Intend { .. }
        | Decision::Forbid => state,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn inputs() -> impl Strategy<Value = Vec<Input>> {
        let input = prop_oneof![
            Just(Input::Reserved { amount: 100 }),
            Just(Input::OrderCancelled),
            Just(Input::DeadlineExtended),
            Just(Input::Prepared),
            Just(Input::Charged),
            Just(Input::NotCharged),
            (-5..120i64).prop_map(|amount| Input::RefundRequested { amount }),
            (1..120i64).prop_map(|amount| Input::RefundDone { amount }),
        ];
        prop::collection::vec(input, 0..20)
    }

    proptest! {
        /// However events and outcomes interleave: announced once, never more given back than was paid, only what was charged, and a
        /// cancelled order's money does not stay with us.
        #[test]
        fn money_is_never_kept_for_a_cancelled_order_nor_given_back_twice(inputs in inputs()) {
            let mut state = None;
            let (mut announced, mut charged, mut asked, mut returned) = (0, 0, 0, 0);
            for input in inputs {
                let decision = decide(state, input);
                match decision {
                    Decision::Succeed | Decision::SucceedAndRefund => { announced += 1; charged = 100 }
                    Decision::Fail => announced += 1,
                    Decision::FinishRefund { amount } => returned += amount,
                    _ => {}
                }
                let before = state;
                state = apply(state, decision);
                asked += state.map_or(0, |s| s.refunding + s.refunded) - before.map_or(0, |s| s.refunding + s.refunded);
                prop_assert!(returned <= asked && asked <= charged, "{returned} of {asked} of {charged}");
                let repeats = matches!(input, Input::RefundRequested { .. } | Input::RefundDone { .. });
                prop_assert!(repeats || apply(state, decide(state, input)) == state || before.is_none());
            }
            prop_assert!(announced <= 1);
            if let Some(State { status, cancelled, refunding, refunded, .. }) = state {
                prop_assert!(!(status == Status::Succeeded && cancelled), "kept the money of a cancelled order");
                prop_assert!(status != Status::Forbidden || announced == 0);
                prop_assert!(status != Status::Refunded || (refunding, refunded) == (0, 100));
                prop_assert!(status != Status::Refunding || refunding > 0);
            }
        }
    }

    #[test]
    fn a_cancellation_before_the_reservation_forbids_the_charge() {
        let tombstone = apply(None, decide(None, Input::OrderCancelled));
        assert_eq!(decide(tombstone, Input::Reserved { amount: 1 }), Decision::Ignore);
        assert_eq!(
            decide(tombstone, Input::RefundRequested { amount: 1 }),
            Decision::RejectRefund("nothing was paid")
        );
    }

    #[test]
    fn parts_are_given_back_up_to_the_whole() {
        let mut state = apply(apply(None, Decision::Intend { amount: 100 }), Decision::Succeed);
        for amount in [60, 40] {
            let decision = decide(state, Input::RefundRequested { amount });
            assert_eq!(decision, Decision::Refund { amount });
            state = apply(state, decision);
        }
        assert_eq!(
            decide(state, Input::RefundRequested { amount: 1 }),
            Decision::RejectRefund("more than was paid")
        );
        state = apply(state, decide(state, Input::RefundDone { amount: 60 }));
        assert_eq!(state.map(|s| (s.refunding, s.refunded, s.status)), Some((40, 60, Status::Succeeded)));
    }
}
