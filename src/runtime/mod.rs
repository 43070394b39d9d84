//! The life cycle of containers.
