//! The environment of a process.

/// PATH where the image sets none: Docker's.
pub const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The environment of a container's first process: defaults, the image's, the caller's; of two values
/// for one name the later wins. HOME is set last, if nobody set it.
pub fn environment(
    hostname: &str,
    tty: bool,
    image: &[String],
    caller: &[String],
    home: &str,
) -> Vec<String> {
    let mut base = vec![DEFAULT_PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if tty {
        base.push("TERM=xterm".to_owned());
    }
    let merged = merge_environment(&merge_environment(&base, image), caller);
    with_home(merged, home)
}

/// `over` laid over `base`: a name that is there keeps its place and gets the new value.
pub fn merge_environment(base: &[String], over: &[String]) -> Vec<String> {
    let mut merged = base.to_vec();
    for variable in over {
        match merged.iter_mut().find(|old| name(old) == name(variable)) {
            Some(old) => old.clone_from(variable),
            None => merged.push(variable.clone()),
        }
    }
    merged
}

fn with_home(mut variables: Vec<String>, home: &str) -> Vec<String> {
    if !variables.iter().any(|variable| name(variable) == "HOME") {
        variables.push(format!("HOME={home}"));
    }
    variables
}

fn name(variable: &str) -> &str {
    variable.split('=').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_later_value_wins() {
        let strings = |list: &[&str]| list.iter().map(|&s| s.to_owned()).collect::<Vec<_>>();
        let image = strings(&["PATH=/opt", "A=1", "B=x=y"]);
        let caller = strings(&["A=2", "C="]);
        assert_eq!(
            environment("box", true, &image, &caller, "/root"),
            strings(&[
                "PATH=/opt",
                "HOSTNAME=box",
                "TERM=xterm",
                "A=2",
                "B=x=y",
                "C=",
                "HOME=/root"
            ])
        );
        let home = environment("box", false, &strings(&["HOME=/app"]), &[], "/root");
        assert_eq!(home, strings(&[DEFAULT_PATH, "HOSTNAME=box", "HOME=/app"]));
    }
}
