//! lb-common
