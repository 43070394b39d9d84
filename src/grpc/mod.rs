//! The services that plyd offers.

pub mod pb;
