//! Socket hooks.
