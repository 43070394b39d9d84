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
    /// Lower files are read by the kernel itself.
    Passthrough,
    /// Pending requests can be sent again to a successor.
    Resend,
    /// Mounts with shifted owners.
    Idmap,
    /// Requests over io_uring.
    IoUring,
    /// Listings of directories are cached.
    CacheDir,
    /// Closing a file is no request.
    NoFlush,
    /// Renames that exchange or that replace nothing.
    Rename2,
    /// Holes can be found.
    Lseek,
    /// Ranges are copied by the server.
    CopyFileRange,
    /// Space is allocated, holes are punched.
    Fallocate,
    /// Files without a name.
    Tmpfile,
    /// Times of birth.
    Statx,
    /// File handles are opened after the kernel has forgotten what they name.
    Export,
}

/// How server and kernel come to use a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// The kernel offers it by a flag of INIT.
    Init(InitFlags),
    /// By a flag in replies to OPEN and OPENDIR, which an older kernel overlooks.
    Reply,
    /// It is a request of its own. One that is answered ENOSYS is never sent again.
    Request,
}

/// What is known of a feature without asking any kernel.
pub struct Description {
    /// The feature.
    pub feature: Feature,
    /// Its name in `-o kernel_features=` and in reports.
    pub name: &'static str,
    /// The minor number of the first protocol that has it; Linux 3.10 speaks 7.22.
    pub minor: u32,
    /// How it comes to be used.
    pub offer: Offer,
    /// Why Plywood does not use it even where the kernel has it.
    pub unused: Option<&'static str>,
}

const fn used(feature: Feature, name: &'static str, minor: u32, offer: Offer) -> Description {
    Description {
        feature,
        name,
        minor,
        offer,
        unused: None,
    }
}

const fn unused(
    feature: Feature,
    name: &'static str,
    minor: u32,
    offer: Offer,
    why: &'static str,
) -> Description {
    Description {
        feature,
        name,
        minor,
        offer,
        unused: Some(why),
    }
}

/// Every feature, in the order of reports.
pub const ALL: [Description; 27] = [
    used(
        Feature::Readdirplus,
        "readdirplus",
        21,
        Offer::Init(InitFlags::FUSE_DO_READDIRPLUS),
    ),
    used(
        Feature::ReaddirplusAuto,
        "readdirplus_auto",
        21,
        Offer::Init(InitFlags::FUSE_READDIRPLUS_AUTO),
    ),
    used(
        Feature::Writeback,
        "writeback",
        23,
        Offer::Init(InitFlags::FUSE_WRITEBACK_CACHE),
    ),
    used(
        Feature::NoOpen,
        "no_open",
        23,
        Offer::Init(InitFlags::FUSE_NO_OPEN_SUPPORT),
    ),
    unused(
        Feature::NoOpendir,
        "no_opendir",
        29,
        Offer::Init(InitFlags::FUSE_NO_OPENDIR_SUPPORT),
        "a listing has to stay the same while a directory is read",
    ),
    used(
        Feature::AtomicTrunc,
        "atomic_trunc",
        9,
        Offer::Init(InitFlags::FUSE_ATOMIC_O_TRUNC),
    ),
    used(
        Feature::CacheSymlinks,
        "cache_symlinks",
        28,
        Offer::Init(InitFlags::FUSE_CACHE_SYMLINKS),
    ),
    used(
        Feature::ParallelDirops,
        "parallel_dirops",
        25,
        Offer::Init(InitFlags::FUSE_PARALLEL_DIROPS),
    ),
    used(
        Feature::KillprivV2,
        "killpriv_v2",
        33,
        Offer::Init(InitFlags::FUSE_HANDLE_KILLPRIV_V2),
    ),
    used(
        Feature::PosixAcl,
        "posix_acl",
        26,
        Offer::Init(InitFlags::FUSE_POSIX_ACL),
    ),
    used(
        Feature::DontMask,
        "dont_mask",
        12,
        Offer::Init(InitFlags::FUSE_DONT_MASK),
    ),
    used(
        Feature::AsyncDio,
        "async_dio",
        22,
        Offer::Init(InitFlags::FUSE_ASYNC_DIO),
    ),
    used(
        Feature::ExplicitInval,
        "explicit_inval",
        30,
        Offer::Init(InitFlags::FUSE_EXPLICIT_INVAL_DATA),
    ),
    used(
        Feature::MaxPages,
        "max_pages",
        28,
        Offer::Init(InitFlags::FUSE_MAX_PAGES),
    ),
    used(
        Feature::Passthrough,
        "passthrough",
        40,
        Offer::Init(InitFlags::FUSE_PASSTHROUGH),
    ),
    unused(
        Feature::Resend,
        "resend",
        40,
        Offer::Init(InitFlags::FUSE_HAS_RESEND),
        "not used yet: for the takeover of a mount by a successor",
    ),
    unused(
        Feature::Idmap,
        "idmap",
        41,
        Offer::Init(InitFlags::FUSE_ALLOW_IDMAP),
        "the kernel would then hide the caller, whom clearing of setuid depends on",
    ),
    unused(
        Feature::IoUring,
        "io_uring",
        42,
        Offer::Init(InitFlags::FUSE_OVER_IO_URING),
        "the FUSE library cannot speak it",
    ),
    used(Feature::CacheDir, "cache_dir", 28, Offer::Reply),
    used(Feature::NoFlush, "no_flush", 35, Offer::Reply),
    used(Feature::Rename2, "rename2", 23, Offer::Request),
    used(Feature::Lseek, "lseek", 24, Offer::Request),
    used(
        Feature::CopyFileRange,
        "copy_file_range",
        28,
        Offer::Request,
    ),
    used(Feature::Fallocate, "fallocate", 19, Offer::Request),
    unused(
        Feature::Tmpfile,
        "tmpfile",
        37,
        Offer::Request,
        "the FUSE library cannot speak it",
    ),
    unused(
        Feature::Statx,
        "statx",
        39,
        Offer::Request,
        "the FUSE library cannot speak it",
    ),
    used(
        Feature::Export,
        "export",
        10,
        Offer::Init(InitFlags::FUSE_EXPORT_SUPPORT),
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

    /// Those that a connection can do without and no program sees it. The requests are not among them, nor
    /// ACLs, the umask that an inherited one overrules, and handles of files that the kernel has forgotten.
    pub fn unseen() -> Self {
        Self::of(|description| {
            description.offer != Offer::Request
                && !matches!(
                    description.feature,
                    Feature::PosixAcl | Feature::DontMask | Feature::Export
                )
        })
    }

    /// Those that the protocol has since a later minor number.
    pub fn newer_than(minor: u32) -> Self {
        Self::of(|description| description.minor > minor)
    }

    fn of(belongs: impl Fn(&Description) -> bool) -> Self {
        let mut set = Self::EMPTY;
        for description in ALL.iter().filter(|description| belongs(description)) {
            set.insert(description.feature);
        }
        set
    }

    /// Without those of another set.
    pub fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

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

    #[test]
    fn what_linux_3_10_has_is_what_its_protocol_has() {
        let old = FeatureSet::ALL.without(FeatureSet::newer_than(22));
        for (feature, has) in [
            (Feature::Readdirplus, true),
            (Feature::AsyncDio, true),
            (Feature::Fallocate, true),
            (Feature::Rename2, false),
            (Feature::Writeback, false),
            (Feature::NoOpen, false),
            (Feature::Lseek, false),
            (Feature::CopyFileRange, false),
            (Feature::CacheDir, false),
        ] {
            assert_eq!(old.contains(feature), has, "{feature:?}");
        }
    }
}
