//! A payment's rules, without a clock, a database or a gateway.

/// Where a payment stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Intended; perhaps charged, perhaps not yet.
    Pending,
    /// Charged.
    Succeeded,
    /// Not charged, and never will be.
    Failed,
    /// Charged, but its order is cancelled: to be given back.
    Refunding,
    /// Given back.
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

/// What is known of a payment when something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Where it stands.
    pub status: Status,
    /// Its order was cancelled.
    pub cancelled: bool,
}

/// What can happen to a payment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Stock is reserved: charge the amount.
    Reserved,
    /// The order is cancelled.
    OrderCancelled,
    /// The gateway charged.
    Charged,
    /// The gateway declined, or the charge was forbidden or came too late.
    NotCharged,
    /// The gateway gave the money back.
    Refunded,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// A new payment, to be charged.
    Intend,
    /// A tombstone.
    Forbid,
    /// The charge under way must not happen, or must be refunded if it did.
    MarkCancelled,
    /// `payments.succeeded` follows.
    Succeed,
    /// `payments.succeeded` follows, and a refund.
    SucceedAndRefund,
    /// `payments.failed` follows.
    Fail,
    /// A refund follows.
    Refund,
    /// `payments.refunded` follows.
    FinishRefund,
    /// Nothing: known already.
    Ignore,
}

/// What a payment makes of an input, in whatever order things arrive.
pub fn decide(state: Option<State>, input: &Input) -> Decision {
    let Some(State { status, cancelled }) = state else {
        return match input {
            Input::Reserved => Decision::Intend,
            Input::OrderCancelled => Decision::Forbid,
            Input::Charged | Input::NotCharged | Input::Refunded => Decision::Ignore,
        };
    };
    match (status, input) {
        (Status::Pending, Input::OrderCancelled) if !cancelled => Decision::MarkCancelled,
        (Status::Pending, Input::Charged) if cancelled => Decision::SucceedAndRefund,
        (Status::Pending, Input::Charged) => Decision::Succeed,
        (Status::Pending, Input::NotCharged) => Decision::Fail,
        (Status::Succeeded, Input::OrderCancelled) => Decision::Refund,
        (Status::Refunding, Input::Refunded) => Decision::FinishRefund,
        _ => Decision::Ignore,
    }
}

/// The state after a decision.
pub fn apply(state: Option<State>, decision: Decision) -> Option<State> {
    let to = |status, cancelled| Some(State { status, cancelled });
    let cancelled = state.is_some_and(|s| s.cancelled);
    match decision {
        Decision::Intend => to(Status::Pending, false),
        Decision::Forbid => to(Status::Forbidden, true),
        Decision::MarkCancelled => to(Status::Pending, true),
        Decision::Succeed => to(Status::Succeeded, cancelled),
        Decision::SucceedAndRefund | Decision::Refund => to(Status::Refunding, true),
        Decision::Fail => to(Status::Failed, cancelled),
        Decision::FinishRefund => to(Status::Refunded, true),
        Decision::Ignore => state,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn inputs() -> impl Strategy<Value = Vec<Input>> {
        let input = prop_oneof![
            Just(Input::Reserved),
            Just(Input::OrderCancelled),
            Just(Input::Charged),
            Just(Input::NotCharged),
            Just(Input::Refunded),
        ];
        prop::collection::vec(input, 0..14)
    }

    proptest! {
        /// However events and outcomes interleave: announced once, refunded at most once and only what was charged, and a cancelled
        /// order's money does not stay with us.
        #[test]
        fn money_is_never_kept_for_a_cancelled_order(inputs in inputs()) {
            let mut state = None;
            let (mut announced, mut refunds) = (0, 0);
            for input in &inputs {
                let decision = decide(state, input);
                announced += u32::from(matches!(decision, Decision::Succeed | Decision::SucceedAndRefund | Decision::Fail));
                refunds += u32::from(matches!(decision, Decision::Refund | Decision::SucceedAndRefund));
                state = apply(state, decision);
                let again = apply(state, decide(state, input));
                prop_assert!(again == state || matches!(input, Input::Reserved) && state.is_none());
            }
            prop_assert!(announced <= 1 && refunds <= 1);
            if let Some(State { status, cancelled }) = state {
                prop_assert!(!(status == Status::Succeeded && cancelled), "kept the money of a cancelled order");
                prop_assert!(status != Status::Forbidden || announced == 0);
            }
        }
    }

    #[test]
    fn a_cancellation_before_the_reservation_forbids_the_charge() {
        let tombstone = apply(None, decide(None, &Input::OrderCancelled));
        assert_eq!(decide(tombstone, &Input::Reserved), Decision::Ignore);
    }
}
