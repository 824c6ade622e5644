//! Reads the pinned maps for people: no agent has to run.
