# Kombi: every chore of the house. `make` alone explains the targets.
#
# Works as root and as an ordinary user who may use sudo for apt-get only.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

GUEST_TARGET := x86_64-unknown-linux-gnu
GUEST := target/guest
RELEASE := target/release
# A jail has no libc.so. Position-independent: addresses stay random.
JAIL_FLAGS := -C target-feature=+crt-static
# static, at a fixed address: no start-up relocations
INIT_FLAGS := -C target-feature=+crt-static -C relocation-model=static
INIT := target/$(GUEST_TARGET)/guest/kombi-init
say = @printf '\033[1m==> %s\033[0m\n' "$(1)"

.PHONY: help
help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

## --- set-up

.PHONY: setup
setup: ## Install what building and testing need (apt packages, cargo tools); only what is missing
	@setup/packages.sh build demo test
	@setup/cargo-tools.sh cargo-nextest cargo-deny

.PHONY: setup-demo
setup-demo:
	@setup/packages.sh build demo

## --- building

.PHONY: kernel
kernel: ## Build the guest kernel (cached by a hash of its configuration and patches)
	$(call say,guest kernel)
	@guest/kernel/build.sh $(GUEST)

.PHONY: debian-kernels
debian-kernels: ## Fetch Debian's stock kernels, which tests boot unchanged (cached; nothing is installed)
	@guest/debian-kernels.sh $(GUEST)

.PHONY: programs
programs: ## Build kombi, kombi-vmm and kombi-jailer in target/release, and the guest's init
	$(call say,kombi)
	@cargo build --release --locked -p cli
	$(call say,kombi-vmm and kombi-jailer: static)
	@RUSTFLAGS="$(JAIL_FLAGS)" cargo build --profile monitor --locked --target $(GUEST_TARGET) -p vmm -p jailer
	@for program in kombi-vmm kombi-jailer; do ln -f target/$(GUEST_TARGET)/monitor/$$program $(RELEASE)/$$program; done
	$(call say,guest init)
	@RUSTFLAGS="$(INIT_FLAGS)" cargo build --locked --profile guest --target $(GUEST_TARGET) -p guest_init
	@mkdir -p $(GUEST)
	@cargo xtask initramfs $(INIT) $(GUEST)/initramfs.cpio

.PHONY: build
build: setup-demo kernel programs ## Build everything that runs: programs, guest kernel, guest init

.PHONY: images
images: ## Make the demo's images on the spot: busybox, and Debian with python3
	@demo/images.sh target/demo

## --- using

.PHONY: demo
demo: build images ## Set up, build, make two images, and run commands in micro-VMs
	@demo/demo.sh

.PHONY: bench
bench: build debian-kernels images ## Measure against QEMU microvm (TCG) and native, side by side
	@setup/packages.sh bench bench-devices
	@cargo run --release --locked -q -p bench -- all

.PHONY: bench-engine
bench-engine: build ## Measure the engine row by row: native, QEMU TCG, Kombi; and its memory
	@setup/packages.sh bench bench-engine
	@bench/guest/image.sh target/bench/debian
	@cargo run --release --locked -q -p bench -- engine

## --- proving

.PHONY: test
test: setup kernel debian-kernels programs images lint ## Set up, build, and run every test and check
	$(call say,tests)
	@cargo nextest run --workspace --locked
	@cargo test --workspace --locked --doc -q
	$(call say,fuzzing: seeds and a few seconds for each target)
	@fuzz/run.sh 4
	$(call say,programs in guests)
	@lab/guests/run.sh --quick python gcc gdb
	@lab/guests/soak/run.sh 20 2
	@$(MAKE) deny

.PHONY: test-guests
test-guests: build ## Run real software in guests and on the host, and compare: GUESTS="redis node", default all
	$(call say,programs in guests)
	@lab/guests/run.sh $(GUESTS)

.PHONY: test-kvm-linux
test-kvm-linux: kernel ## Boot our kernel on /dev/kvm, whatever plays it: minutes where that is software
	$(call say,linux on kvm)
	@cargo test --locked -p vmm --test kvm_linux -- --nocapture

.PHONY: soak
soak: build ## Ten minutes of what goes wrong between processors, in a machine with two: SECONDS=600 CPUS=2
	$(call say,soak)
	@lab/guests/soak/run.sh $(or $(SECONDS),600) $(or $(CPUS),2)

.PHONY: lint
lint: ## Formatting, clippy with warnings denied, the house's own rules
	$(call say,lint)
	@cargo fmt --all --check
	@cd fuzz && cargo fmt --check
	@cargo clippy --workspace --all-targets --locked -q -- -D warnings
	@cargo xtask tidy

.PHONY: deny
deny: ## Licences, sources and bans of dependencies; advisories when their database can be reached
	@setup/deny.sh

.PHONY: fuzz
fuzz: ## Fuzz guided by coverage, ten minutes each: FUZZ_SECONDS=600 FUZZ_TARGETS="http vsock", default all
	@fuzz/run.sh $(or $(FUZZ_SECONDS),600) $(FUZZ_TARGETS)

.PHONY: fuzz-properties
fuzz-properties: ## Long runs of the property and differential tests (bounded parts are in make test)
	KOMBI_FUZZ_CASES=60000 KOMBI_DIFF_CASES=120000 KOMBI_SOUP_CASES=200000 PROPTEST_CASES=20000 cargo nextest run --workspace --locked --profile fuzz \
		-E 'binary(differential) | binary(mutations) | binary(properties) | binary(frames) | test(/random|any_|hostile|upsets_|no_file|no_json/)'

.PHONY: verify-kernel
verify-kernel: kernel ## Boot the guest kernel three times in QEMU and try 254 of its features each time
	@guest/kernel/verify.sh $(GUEST)

.PHONY: clean
clean: ## Remove what was built here (the kernel cache in ~/.cache/kombi stays)
	cargo clean
