# `make help` lists the targets. What takes more than a line lives in contrib/ and tests/.

# Everything that ships is built once, fully static, so that it runs on hosts with an old C library. Naming the target
# keeps the flags away from build scripts.
TARGET := $(shell uname -m)-unknown-linux-gnu
RELEASE := target/$(TARGET)/release
STATIC := RUSTFLAGS="-C target-feature=+crt-static" cargo build --locked --release --target $(TARGET)
BENCH := RUSTFLAGS="-C target-feature=+crt-static" cargo bench --locked --target $(TARGET)
PROGRAMS := plyd plyfs plyshim snapctl
# Where `make install` puts everything; whoever makes a package sets DESTDIR.
PREFIX := /usr/local
DESTDIR :=
# Of bash, zsh and fish.
COMPLETIONS := share/bash-completion/completions/snapctl share/zsh/site-functions/_snapctl share/fish/vendor_completions.d/snapctl.fish
# Root is needed to mount and to run containers.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# What a build needs beside Rust.
BUILD_PACKAGES := gcc libc6-dev

# How long `make fuzz` takes for each target, and which; all if none is named.
MINUTES := 1
TARGETS :=

.DEFAULT_GOAL := help
.PHONY: help run test test-full soak fuzz lint bench release install

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

run: ## build Plywood and run a container on it, from nothing to an exit code; IMAGE=archive.tar runs your image
	@test -z "$(IMAGE)" || test -r "$(IMAGE)" || { echo "cannot read IMAGE=$(IMAGE); give the path of an image archive, or leave it out" >&2; exit 1; }
	@contrib/install-packages $(BUILD_PACKAGES) runc busybox-static procps
	@$(STATIC)
	@$(SUDO) env IMAGE="$(IMAGE)" contrib/demo $(RELEASE)

test: ## install what the tests need and run all of them
	@contrib/install-packages $(BUILD_PACKAGES) @tests/packages
	@tests/all

test-full: ## as test, with the long forms of those that have one
	@PLYWOOD_TEST_FULL=1 $(MAKE) --no-print-directory test

soak: ## a million operations of fsx, and half a minute of each stressor; `make test` has the short forms
	@contrib/install-packages $(BUILD_PACKAGES) @tests/packages
	@cargo build --locked
	@contrib/as-root tests/fsx/run 1000000
	@contrib/as-root tests/stress/run 30

fuzz: ## damage and forge what reads layers, guided by coverage: MINUTES=1 for each target, TARGETS="tar view" for some
	@contrib/install-packages $(BUILD_PACKAGES) g++
	@tests/fuzz/guided-run $(MINUTES) $(TARGETS)

lint: ## formatting, clippy, and rules of our own
	@contrib/install-packages $(BUILD_PACKAGES)
	@tests/lint

bench: ## compare plyfs with kernel overlayfs and fuse-overlayfs, and the store with containerd's overlayfs snapshotter
	@contrib/install-packages $(BUILD_PACKAGES) @tests/packages
	@$(BENCH) --bench union --bench store --no-run
	@contrib/as-root env $(BENCH) --bench union --bench store

release: ## build the four programs fully static
	@contrib/install-packages $(BUILD_PACKAGES) file
	@$(STATIC)
	@for program in $(PROGRAMS); do file -b $(RELEASE)/$$program | grep -Eq 'static(-pie)?(ally)? linked' || { echo "$$program is not static" >&2; exit 1; }; done
	@cd $(RELEASE) && ls -l $(PROGRAMS)

install: ## put what `make release` has built below PREFIX=/usr/local, with the systemd unit and shell completions; DESTDIR= for packages
	@test -x $(RELEASE)/snapctl || { echo "there is nothing to install yet; run \`make release\` first" >&2; exit 1; }
	install -d $(addprefix $(DESTDIR)$(PREFIX)/,bin lib/systemd/system $(dir $(COMPLETIONS)))
	install -m 755 $(addprefix $(RELEASE)/,$(PROGRAMS)) $(DESTDIR)$(PREFIX)/bin
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' contrib/systemd/plywood.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/plywood.service
	$(RELEASE)/snapctl completions bash >$(DESTDIR)$(PREFIX)/$(word 1,$(COMPLETIONS))
	$(RELEASE)/snapctl completions zsh >$(DESTDIR)$(PREFIX)/$(word 2,$(COMPLETIONS))
	$(RELEASE)/snapctl completions fish >$(DESTDIR)$(PREFIX)/$(word 3,$(COMPLETIONS))
	chmod 644 $(addprefix $(DESTDIR)$(PREFIX)/,lib/systemd/system/plywood.service $(COMPLETIONS))
