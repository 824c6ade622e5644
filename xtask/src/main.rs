//! Build system entry.
fn main() {}
