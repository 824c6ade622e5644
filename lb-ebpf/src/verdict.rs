//! How a packet's way ends: what is counted and what the hook does, in one word, so that a subprogram can return it.

use lb_common::outcome::Outcome;

/// A stage's result: a value for the next stage, or the end.
pub type Stage<T> = Result<T, End>;

/// The end of a packet's way. Outcome in the low byte, kind in the next, the redirect helper's verdict in the high
/// word.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct End(u64);

const PASS: u64 = 0;
const DROP: u64 = 1;
const REFUSE: u64 = 2;
const REDIRECT: u64 = 3;
const NEW_FLOW: u64 = 4;

/// What the hook does with the packet.
#[derive(Clone, Copy)]
pub enum Action {
    /// On to the stack (or out of the device, on egress), changed or not.
    Pass,
    /// Away.
    Drop,
    /// As the redirect helper said.
    Redirect(u32),
}

impl End {
    /// No flow entry: the packet may open one. Not counted; another end follows.
    pub const NEW_FLOW: Self = Self(NEW_FLOW << 8);

    /// The packet goes on.
    #[inline(always)]
    pub const fn pass(outcome: Outcome) -> Self {
        Self(PASS << 8 | outcome as u64)
    }

    /// Dropped in silence.
    #[inline(always)]
    pub const fn drop(outcome: Outcome) -> Self {
        Self(DROP << 8 | outcome as u64)
    }

    /// To be answered with a TCP reset or an ICMP port unreachable.
    #[inline(always)]
    pub const fn refuse(outcome: Outcome) -> Self {
        Self(REFUSE << 8 | outcome as u64)
    }

    /// Sent by a redirect helper, which returned `verdict`.
    #[inline(always)]
    pub const fn redirect(outcome: Outcome, verdict: u32) -> Self {
        Self((verdict as u64) << 32 | REDIRECT << 8 | outcome as u64)
    }

    /// As [`End::redirect`], for an outcome that came as a number.
    #[inline(always)]
    pub const fn answered(outcome: u32, verdict: u32) -> Self {
        Self((verdict as u64) << 32 | REDIRECT << 8 | (outcome & 0xff) as u64)
    }

    /// From a subprogram's return value.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// For a subprogram to return.
    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The packet may open a flow.
    #[inline(always)]
    pub const fn is_new_flow(self) -> bool {
        self.kind() == NEW_FLOW
    }

    /// The packet is to be answered.
    #[inline(always)]
    pub const fn is_refusal(self) -> bool {
        self.kind() == REFUSE
    }

    /// The number of the outcome to count.
    #[inline(always)]
    pub const fn outcome(self) -> u32 {
        (self.0 & 0xff) as u32
    }

    /// What the hook does.
    #[inline(always)]
    pub const fn action(self) -> Action {
        match self.kind() {
            PASS => Action::Pass,
            REDIRECT => Action::Redirect((self.0 >> 32) as u32),
            _ => Action::Drop,
        }
    }

    #[inline(always)]
    const fn kind(self) -> u64 {
        self.0 >> 8 & 0xff
    }
}
