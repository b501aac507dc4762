//! Injection.
