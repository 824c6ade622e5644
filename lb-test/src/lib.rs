//! lb-test
