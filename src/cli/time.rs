//! Points in time as people and programs want them: an age in words, RFC 3339 in UTC.

use std::time::{SystemTime, UNIX_EPOCH};

use prost_types::Timestamp;

/// RFC 3339 in UTC with nanoseconds, e.g. `2026-09-01T12:00:00.000000000Z`.
pub fn rfc3339(time: &Timestamp) -> String {
    let (year, month, day) = civil(time.seconds.div_euclid(86_400));
    let second = time.seconds.rem_euclid(86_400);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        time.nanos
    )
}

/// How long ago, in the largest unit that fits, e.g. `3 hours ago`.
pub fn age(time: Option<&Timestamp>) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    let now = i64::try_from(now).unwrap_or(i64::MAX);
    match time {
        None => "-".to_owned(),
        Some(time) => age_at(now, time.seconds),
    }
}

fn age_at(now: i64, then: i64) -> String {
    const UNITS: [(i64, &str); 5] = [
        (365 * 86_400, "year"),
        (30 * 86_400, "month"),
        (86_400, "day"),
        (3600, "hour"),
        (60, "minute"),
    ];
    let seconds = now.saturating_sub(then).max(0);
    let (count, unit) = UNITS
        .iter()
        .find(|(length, _)| seconds >= *length)
        .map_or((seconds, "second"), |(length, unit)| {
            (seconds / length, *unit)
        });
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {unit}{plural} ago")
}

/// Year, month and day of a count of days since 1970-01-01 in the Gregorian calendar. Years are
/// counted from March, so that the leap day is a year's last.
fn civil(days: i64) -> (i64, i64, i64) {
    const DAYS_OF_ERA: i64 = 146_097; // 400 years
    const TO_EPOCH: i64 = 719_468; // from 0000-03-01 to 1970-01-01
    let days = days.saturating_add(TO_EPOCH);
    let era = days.div_euclid(DAYS_OF_ERA);
    let day_of_era = days.rem_euclid(DAYS_OF_ERA);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000007Z"),
            (951_782_400, "2000-02-29T00:00:00.000000007Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000000007Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000007Z"),
            (-1, "1969-12-31T23:59:59.000000007Z"),
        ] {
            assert_eq!(rfc3339(&Timestamp { seconds, nanos: 7 }), text);
        }
    }

    #[test]
    fn ages() {
        assert_eq!(age_at(100, 99), "1 second ago");
        assert_eq!(age_at(100, 200), "0 seconds ago");
        assert_eq!(age_at(7200, 0), "2 hours ago");
        assert_eq!(age_at(86_400 * 400, 0), "1 year ago");
        assert_eq!(age(None), "-");
    }
}
