//! The commands of `snapctl` and what they print.
