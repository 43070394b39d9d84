//! The optional features of the FUSE protocol: which of them Plywood can use, what each is for, and
//! which the user masked.

use fuser::InitFlags;

/// One optional feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Feature {
    /// Directory entries come with their attributes.
    Readdirplus,
    /// The kernel decides listing by listing whether they do.
    ReaddirplusAuto,
    /// Writes are gathered in the kernel's page cache.
    Writeback,
    /// Files are opened without asking the server.
    NoOpen,
    /// Directories are opened without asking the server.
    NoOpendir,
    /// O_TRUNC comes with OPEN instead of in a request of its own.
    AtomicTrunc,
    /// Targets of symbolic links are cached.
    CacheSymlinks,
    /// Lookups and listings in one directory run side by side.
    ParallelDirops,
    /// The server clears setuid, setgid and capabilities on writes.
    KillprivV2,
    /// Access control lists are kept and enforced.
    PosixAcl,
    /// The server applies the umask.
    DontMask,
    /// Direct I/O is sent in parallel.
    AsyncDio,
    /// Only explicit requests drop cached pages.
    ExplicitInval,
    /// Requests of more than 128 KiB.
    MaxPages,
    /// Reads and writes of open files go to the host's files without the server.
    Passthrough,
    /// Pending requests can be sent again to a successor.
    Resend,
    /// Mounts with shifted owners.
    Idmap,
    /// Requests over io_uring.
    IoUring,
}

/// What is known of a feature without asking any kernel.
pub struct Description {
    /// The feature.
    pub feature: Feature,
    /// Its name in `-o kernel_features=` and in reports.
    pub name: &'static str,
    /// The flag of INIT that offers it.
    pub flag: InitFlags,
    /// Why Plywood does not use it even where the kernel has it.
    pub unused: Option<&'static str>,
}

const fn used(feature: Feature, name: &'static str, flag: InitFlags) -> Description {
    Description {
        feature,
        name,
        flag,
        unused: None,
    }
}

const fn unused(
    feature: Feature,
    name: &'static str,
    flag: InitFlags,
    why: &'static str,
) -> Description {
    Description {
        feature,
        name,
        flag,
        unused: Some(why),
    }
}

/// Every feature, in the order of reports.
pub const ALL: [Description; 18] = [
    used(
        Feature::Readdirplus,
        "readdirplus",
        InitFlags::FUSE_DO_READDIRPLUS,
    ),
    used(
        Feature::ReaddirplusAuto,
        "readdirplus_auto",
        InitFlags::FUSE_READDIRPLUS_AUTO,
    ),
    used(
        Feature::Writeback,
        "writeback",
        InitFlags::FUSE_WRITEBACK_CACHE,
    ),
    used(Feature::NoOpen, "no_open", InitFlags::FUSE_NO_OPEN_SUPPORT),
    unused(
        Feature::NoOpendir,
        "no_opendir",
        InitFlags::FUSE_NO_OPENDIR_SUPPORT,
        "a listing has to stay the same while a directory is read",
    ),
    used(
        Feature::AtomicTrunc,
        "atomic_trunc",
        InitFlags::FUSE_ATOMIC_O_TRUNC,
    ),
    used(
        Feature::CacheSymlinks,
        "cache_symlinks",
        InitFlags::FUSE_CACHE_SYMLINKS,
    ),
    used(
        Feature::ParallelDirops,
        "parallel_dirops",
        InitFlags::FUSE_PARALLEL_DIROPS,
    ),
    used(
        Feature::KillprivV2,
        "killpriv_v2",
        InitFlags::FUSE_HANDLE_KILLPRIV_V2,
    ),
    used(Feature::PosixAcl, "posix_acl", InitFlags::FUSE_POSIX_ACL),
    used(Feature::DontMask, "dont_mask", InitFlags::FUSE_DONT_MASK),
    used(Feature::AsyncDio, "async_dio", InitFlags::FUSE_ASYNC_DIO),
    used(
        Feature::ExplicitInval,
        "explicit_inval",
        InitFlags::FUSE_EXPLICIT_INVAL_DATA,
    ),
    used(Feature::MaxPages, "max_pages", InitFlags::FUSE_MAX_PAGES),
    unused(
        Feature::Passthrough,
        "passthrough",
        InitFlags::FUSE_PASSTHROUGH,
        "not used yet: excludes the writeback cache, and a write could reach a lower layer",
    ),
    unused(
        Feature::Resend,
        "resend",
        InitFlags::FUSE_HAS_RESEND,
        "not used yet: for the takeover of a mount by a successor",
    ),
    unused(
        Feature::Idmap,
        "idmap",
        InitFlags::FUSE_ALLOW_IDMAP,
        "the kernel would then hide the caller, whom clearing of setuid depends on",
    ),
    unused(
        Feature::IoUring,
        "io_uring",
        InitFlags::FUSE_OVER_IO_URING,
        "the FUSE library cannot speak it",
    ),
];

impl Feature {
    /// The feature of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        ALL.iter().find(|d| d.name == name).map(|d| d.feature)
    }

    /// What is known of it.
    pub fn description(self) -> &'static Description {
        &ALL[self as usize]
    }
}

/// A set of features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeatureSet(u32);

impl FeatureSet {
    /// None of them.
    pub const EMPTY: Self = Self(0);
    /// All of them.
    pub const ALL: Self = Self((1 << ALL.len()) - 1);

    /// Adds one.
    pub fn insert(&mut self, feature: Feature) {
        self.0 |= 1 << feature as u32;
    }

    /// Takes one away.
    pub fn remove(&mut self, feature: Feature) {
        self.0 &= !(1 << feature as u32);
    }

    /// Whether it is in.
    pub fn contains(self, feature: Feature) -> bool {
        self.0 & (1 << feature as u32) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_features() {
        for (index, description) in ALL.iter().enumerate() {
            assert_eq!(description.feature as usize, index, "{}", description.name);
            assert_eq!(
                Feature::by_name(description.name),
                Some(description.feature)
            );
        }
    }

    #[test]
    fn sets_hold_what_was_put_in() {
        let mut set = FeatureSet::EMPTY;
        set.insert(Feature::Writeback);
        assert!(set.contains(Feature::Writeback) && !set.contains(Feature::NoOpen));
        assert!(FeatureSet::ALL.contains(Feature::IoUring));
        set.remove(Feature::Writeback);
        assert_eq!(set, FeatureSet::EMPTY);
    }
}
