//! What lies on disk below plyd's root.
