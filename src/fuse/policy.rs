//! What a connection agrees with the kernel on: the kernel's offer, the user's options and
//! the mask make one set of features.

use fuser::{InitFlags, KernelConfig, Version};

use super::features::{self, Feature, FeatureSet, Offer};
use super::options::SessionOptions;
use crate::sys::process;

/// The longest WRITE: 1 MiB, the most that `max_pages` allows by default.
const MAX_WRITE: u32 = 1 << 20;

/// Requests that the kernel may have under way on its own account, as read-ahead and write-back.
const MAX_BACKGROUND: u16 = 64;

/// Why the kernel lets a process pass no files through.
pub const NEEDS_ADMIN: &str = "it takes CAP_SYS_ADMIN on the host";

/// What was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Features in use.
    pub in_use: FeatureSet,
    /// Features that the kernel offered.
    pub offered: FeatureSet,
    /// Answer OPEN with ENOSYS and never see it again.
    pub no_open: bool,
    /// The kernel gathers writes and keeps size and times of its own.
    pub writeback: bool,
    /// The kernel reads lower files by itself.
    pub passthrough: bool,
    /// The umask comes with the request and is the server's to apply.
    pub dont_mask: bool,
}

impl Policy {
    /// Nothing agreed on: what holds before INIT.
    pub const PLAIN: Self = Self {
        in_use: FeatureSet::EMPTY,
        offered: FeatureSet::EMPTY,
        no_open: false,
        writeback: false,
        passthrough: false,
        dont_mask: false,
    };

    /// Whether a feature is in use.
    pub fn uses(&self, feature: Feature) -> bool {
        self.in_use.contains(feature)
    }

    /// Chooses, and asks the kernel for it.
    pub fn negotiate(config: &mut KernelConfig, options: &SessionOptions, no_acl: bool) -> Self {
        let offer = config.capabilities();
        let Version(_, minor) = config.kernel_abi();
        let mut offered = FeatureSet::EMPTY;
        for description in &features::ALL {
            let has = match description.offer {
                Offer::Init(flag) => offer.contains(flag),
                Offer::Reply | Offer::Request => minor >= description.minor,
            };
            if has {
                offered.insert(description.feature);
            }
        }
        let mut options = *options;
        if options.passthrough && !process::administers_the_host() {
            tracing::warn!("files are not passed through: {NEEDS_ADMIN}");
            options.passthrough = false;
        }
        let mut policy = Self::choose(offered, &options, no_acl);
        for description in &features::ALL {
            let Offer::Init(flag) = description.offer else {
                continue;
            };
            // That you may answer ENOSYS is not asked for, and MAX_PAGES is fuser's own affair.
            let asked = policy.uses(description.feature)
                && !matches!(description.feature, Feature::NoOpen | Feature::MaxPages);
            // One at a time: fuser takes all of a set or nothing.
            if asked && config.add_capabilities(flag).is_err() {
                policy.in_use.remove(description.feature);
            }
        }
        let limit = if policy.uses(Feature::MaxPages) {
            MAX_WRITE
        } else {
            // 32 pages, which every kernel takes.
            128 << 10
        };
        if policy.uses(Feature::Passthrough) {
            // Lower layers on a stacked file system are beyond that, and their files served by requests; with more, kernel
            // overlayfs could not be mounted on top.
            let _ = config.set_max_stack_depth(1);
        }
        policy.passthrough = policy.uses(Feature::Passthrough);
        if options.passthrough && !policy.passthrough {
            tracing::warn!(
                "files are not passed through: it takes Linux 6.9, and `kernel_features` must not mask it"
            );
        }
        // Each of these answers only with the nearest value that it would take; ours are in range.
        let _ = config.set_max_write(options.max_write.unwrap_or(limit).min(limit));
        let _ = config.set_max_background(MAX_BACKGROUND);
        policy
    }

    /// The choice alone.
    fn choose(offered: FeatureSet, options: &SessionOptions, no_acl: bool) -> Self {
        let mut in_use = FeatureSet::EMPTY;
        for description in &features::ALL {
            if description.unused.is_none()
                && offered.contains(description.feature)
                && options.allowed.contains(description.feature)
            {
                in_use.insert(description.feature);
            }
        }
        if no_acl {
            in_use.remove(Feature::PosixAcl);
        }
        if !options.writeback {
            in_use.remove(Feature::Writeback);
        }
        if !options.no_open {
            in_use.remove(Feature::NoOpen);
        }
        let no_open = in_use.contains(Feature::NoOpen);
        if !options.passthrough || no_open || in_use.contains(Feature::Writeback) {
            in_use.remove(Feature::Passthrough);
        }
        if no_open {
            // Without OPEN there would be nobody to truncate.
            in_use.remove(Feature::AtomicTrunc);
        }
        if !in_use.contains(Feature::Readdirplus) {
            in_use.remove(Feature::ReaddirplusAuto);
        }
        Self {
            in_use,
            offered,
            no_open,
            writeback: in_use.contains(Feature::Writeback),
            passthrough: in_use.contains(Feature::Passthrough),
            dont_mask: in_use.contains(Feature::DontMask),
        }
    }
}

/// The flag of INIT that is never asked for: fuser 0.18 misreads the longer SETXATTR that follows.
pub const NEVER: InitFlags = InitFlags::FUSE_SETXATTR_EXT;

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(options: &SessionOptions) -> Policy {
        Policy::choose(FeatureSet::ALL, options, false)
    }

    #[test]
    fn what_the_library_or_the_design_cannot_use_is_not_asked_for() {
        let policy = choose(&SessionOptions::default());
        for description in &features::ALL {
            if let Offer::Init(flag) = description.offer {
                assert!(!flag.intersects(NEVER), "{}", description.name);
            }
            if description.unused.is_some() {
                assert!(!policy.in_use.contains(description.feature));
            }
        }
    }

    #[test]
    fn opens_are_answered_or_not() {
        let policy = choose(&SessionOptions::default());
        assert!(!policy.no_open && policy.in_use.contains(Feature::AtomicTrunc));
        let policy = choose(&SessionOptions {
            no_open: true,
            ..SessionOptions::default()
        });
        assert!(policy.no_open);
        assert!(!policy.in_use.contains(Feature::AtomicTrunc));
    }

    #[test]
    fn passthrough_is_asked_for_and_yields_to_what_it_excludes() {
        assert!(!choose(&SessionOptions::default()).passthrough);
        let asked = SessionOptions {
            passthrough: true,
            ..SessionOptions::default()
        };
        assert!(choose(&asked).passthrough);
        for (no_open, writeback) in [(true, false), (false, true)] {
            let policy = choose(&SessionOptions {
                no_open,
                writeback,
                ..asked
            });
            assert!(!policy.passthrough && !policy.uses(Feature::Passthrough));
        }
    }

    #[test]
    fn an_old_kernel_or_a_mask_leaves_a_plain_connection() {
        let options = SessionOptions {
            allowed: FeatureSet::EMPTY,
            no_open: true,
            writeback: true,
            passthrough: true,
            ..SessionOptions::default()
        };
        let masked = choose(&options);
        assert_eq!(masked.in_use, FeatureSet::EMPTY);
        assert!(!masked.no_open && !masked.writeback && !masked.dont_mask);
        assert!(!masked.passthrough);
        let old = Policy::choose(FeatureSet::EMPTY, &SessionOptions::default(), false);
        assert_eq!(old.in_use, FeatureSet::EMPTY);
    }
}
