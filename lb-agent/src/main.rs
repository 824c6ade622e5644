//! lb-agent
fn main() {}
