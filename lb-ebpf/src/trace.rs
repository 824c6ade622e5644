//! Logging of decisions, in the tracing build only.
