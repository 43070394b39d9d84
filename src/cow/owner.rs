//! Whose an object is: how the owners that lie on the host relate to those that the union shows.
//!
//! A mapping lets one tree serve several user namespaces without a chown of every file; squashing
//! shows everything as one user's. The two are independent for users and for groups.

/// What is shown for an owner that no range of a mapping covers, and stored for a caller whom none
/// covers: the kernel's own default (`/proc/sys/kernel/overflowuid`).
pub const OVERFLOW_ID: u32 = 65_534;

/// A range of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// First id on the host.
    pub host: u32,
    /// What the first one is shown as.
    pub shown: u32,
    /// How many there are.
    pub length: u32,
}

impl IdRange {
    /// Whether all of its ids are valid: the last number stands for "no change" in system calls.
    pub fn is_valid(&self) -> bool {
        let fits = |first: u32| first.checked_add(self.length).is_some();
        self.length > 0 && fits(self.host) && fits(self.shown)
    }

    /// Whether an id of the host, or one that is shown, is in both; the ranges are valid.
    pub fn overlaps(&self, other: &Self) -> bool {
        let meet = |one: u32, two: u32| one < two + other.length && two < one + self.length;
        meet(self.host, other.host) || meet(self.shown, other.shown)
    }
}

/// How users, or groups, on the host are shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdView {
    /// The ranges of the mapping; with none, ids are shown as they are.
    pub ranges: Vec<IdRange>,
    /// Show everything as this one's, whatever the mapping says, and keep changes of owner away from the host.
    pub squash: Option<u32>,
}

impl IdView {
    /// What an id of the host is shown as.
    pub fn shown(&self, host: u32) -> u32 {
        self.squash.unwrap_or_else(|| self.mapped(host))
    }

    fn mapped(&self, host: u32) -> u32 {
        if self.ranges.is_empty() {
            return host;
        }
        let found = self.ranges.iter().find_map(|range| {
            let offset = host.checked_sub(range.host)?;
            (offset < range.length).then(|| range.shown + offset)
        });
        found.unwrap_or(OVERFLOW_ID)
    }

    /// The id of the host that is shown as this one; nothing where the mapping has none.
    pub fn stored(&self, shown: u32) -> Option<u32> {
        if self.ranges.is_empty() {
            return Some(shown);
        }
        self.ranges.iter().find_map(|range| {
            let offset = shown.checked_sub(range.shown)?;
            (offset < range.length).then(|| range.host + offset)
        })
    }

    /// The owner that a new object of `caller` gets on the host.
    pub fn of_new(&self, caller: u32) -> u32 {
        self.stored(self.squash.unwrap_or(caller))
            .unwrap_or(OVERFLOW_ID)
    }
}

/// The view of users and that of groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owners {
    /// Users.
    pub users: IdView,
    /// Groups.
    pub groups: IdView,
}

impl Owners {
    /// Everything is shown as owned by one user and group.
    pub fn squashed(uid: u32, gid: u32) -> Self {
        let squash = |id| IdView {
            squash: Some(id),
            ..IdView::default()
        };
        Self {
            users: squash(uid),
            groups: squash(gid),
        }
    }

    /// Whether an owner is made up, so that the host's may stay what it is where it cannot be changed.
    pub fn is_squashed(&self) -> bool {
        self.users.squash.is_some() || self.groups.squash.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(ranges: &[(u32, u32, u32)]) -> IdView {
        IdView {
            ranges: ranges
                .iter()
                .map(|&(host, shown, length)| IdRange {
                    host,
                    shown,
                    length,
                })
                .collect(),
            squash: None,
        }
    }

    #[test]
    fn without_a_mapping_ids_are_what_they_are() {
        let view = IdView::default();
        assert_eq!((view.shown(7), view.stored(7)), (7, Some(7)));
        assert_eq!(view.of_new(u32::MAX - 1), u32::MAX - 1);
    }

    #[test]
    fn a_mapping_goes_both_ways_and_has_ends() {
        let view = view(&[(0, 1000, 1), (1, 110_000, 65_536)]);
        for (host, shown) in [(0, 1000), (1, 110_000), (65_536, 175_535)] {
            assert_eq!(view.shown(host), shown);
            assert_eq!(view.stored(shown), Some(host));
        }
        assert_eq!(view.shown(65_537), OVERFLOW_ID);
        assert_eq!(view.stored(1001), None);
        assert_eq!(view.of_new(1001), OVERFLOW_ID);
        assert_eq!(view.of_new(110_005), 6);
    }

    #[test]
    fn what_is_squashed_is_stored_as_the_mapping_has_it() {
        let view = IdView {
            squash: Some(1000),
            ..view(&[(5, 1000, 1)])
        };
        assert_eq!(view.shown(77), 1000);
        assert_eq!(view.of_new(33), 5);
    }

    #[test]
    fn ranges_that_leave_the_numbers_are_not_valid() {
        let range = |host, shown, length| IdRange {
            host,
            shown,
            length,
        };
        assert!(range(0, u32::MAX - 1, 1).is_valid());
        assert!(!range(0, 1000, 0).is_valid());
        assert!(!range(u32::MAX, 0, 1).is_valid());
        assert!(!range(0, 2, u32::MAX - 1).is_valid());
    }
}
