# Everything is built without cgo, so that a binary runs in any guest.
export CGO_ENABLED = 0

GO ?= go

KERNELS ?= 6.12 6.1

# The machine's tools, as Debian packages: one that is missing is installed by
# `make setup` when root runs it, and named otherwise.
VM_PACKAGES = qemu-system-x86 iptables nftables ebtables arptables tcpdump conntrack busybox-static iproute2 iputils-ping kmod util-linux \
	xz-utils zstd
BUILD_PACKAGES = gcc libc6-dev make flex bison bc libelf-dev libssl-dev dwarves
PACKAGES = $(VM_PACKAGES) clang-19 llvm-19 clang-format-19 libbpf-dev linux-libc-dev git cpio netbase strace

# What a kernel's guests run is in build/, of arm64 in build/arm64/.
bin = build/$(if $(filter %-arm64,$(1)),arm64/)
build/arm64/%: export GOARCH = arm64

.SECONDEXPANSION:
.DELETE_ON_ERROR:
.PHONY: help demo build install setup setup-vm setup-arm64 generate lint lint-go lint-bpf fmt fuzz cross clean vm test test-quick test-all test-unit test-live test-e2e test-e2e-lockdown test-e2e-no-btf test-churn test-interleave test-matrix test-truth test-arm64 test-builtin kernel-builtin setup-builtin bench pgo

help:
	@sed -n 's/^#: //p' $(MAKEFILE_LIST)

#: make demo                the main job: traced packets between containers, here or in a VM; DEMOFLAGS='-vm -kernel 6.1'
demo: setup-vm
	@$(GO) build -o build/ ./cmd/nftrace ./testenv/cmd/demo ./testenv/cmd/traffic
	@build/demo $(DEMOFLAGS)

#: make build               build/nftrace
build: build/nftrace

#: make install             to $(DESTDIR)$(PREFIX)/bin; PREFIX is /usr/local
PREFIX = /usr/local
install: build
	install -D -m 755 build/nftrace $(DESTDIR)$(PREFIX)/bin/nftrace

#: make setup               install the Debian packages that are missing
define install-missing
@missing=$$(for p in $(1); do \
	dpkg-query -W -f '$${Status}' "$$p" 2>/dev/null | grep -q 'ok installed' || printf '%s ' "$$p"; done); \
if [ -z "$$missing" ]; then exit 0; fi; \
if [ "$$(id -u)" != 0 ]; then echo "setup: missing packages: $$missing(run make setup as root)" >&2; exit 1; fi; \
export DEBIAN_FRONTEND=noninteractive; \
set -x; apt-get update -q && apt-get install -y -q --no-install-recommends $$missing
endef
setup:
	$(call install-missing,$(PACKAGES))
setup-vm:
	$(call install-missing,$(VM_PACKAGES))
setup-arm64:
	$(call install-missing,$(VM_PACKAGES) qemu-system-arm)

setup-builtin:
	$(call install-missing,$(VM_PACKAGES) $(BUILD_PACKAGES))

#: make generate            compile bpf/*.c again (what it makes is committed)
generate:
	$(GO) generate ./...

#: make lint                gofmt, go vet, staticcheck, clang-format
lint: lint-go lint-bpf
lint-go:
	@bad=$$(gofmt -l .); if [ -n "$$bad" ]; then echo "not formatted (make fmt):" $$bad >&2; exit 1; fi
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
lint-bpf:
	clang-format-19 --dry-run -Werror bpf/*.[ch]

#: make fmt                 format Go and C
fmt:
	gofmt -w .
	clang-format-19 -i bpf/*.[ch]

#: make vm CMD='uname -a'   run a shell line in a VM; KERNEL=6.1, VMFLAGS='-smp 2 -put a:/b' (see build/vm -h)
KERNEL ?= 6.12
CMD ?= uname -a
vm: build/vm $(call bin,$(KERNEL))vm
	build/vm -kernel $(KERNEL) $(VMFLAGS) -- sh -c '$(subst ','\'',$(CMD))'

# make vm-6.1 CMD='uname -a'
vm-%: build/vm $$(call bin,$$*)vm
	build/vm -kernel $* $(VMFLAGS) -- sh -c '$(subst ','\'',$(CMD))'

#: make test                unit tests, then scenarios and some of the rulesets in a VM with each kernel
test: test-unit test-quick

# What no kernel runs here, and what each leaves to the other.
QUICK_SKIP = ^TestTruth$$$$/^fresh$$$$|^TestTruthARP$$$$
QUICK_SKIP.6.12 = $(QUICK_SKIP)|^TestTruth$$$$/^shared$$$$/^rules-matching$$$$|^TestCases$$$$/(-tree-container$$$$|-named-container$$$$|^(tee-filtered|s9-flowtable|rewritten-tree|equal-priorities)$$$$)
QUICK_SKIP.6.1 = $(QUICK_SKIP)|^TestCases$$$$/(^s[4-6]|-tree-container$$$$)|^TestTruthEB$$$$
test-quick:
	$(MAKE) test-e2e RUN='^(TestCases|TestBadInput|TestTruth.*)$$$$' SKIP='$(QUICK_SKIP)' SKIP.6.12='$(QUICK_SKIP.6.12)' SKIP.6.1='$(QUICK_SKIP.6.1)' \
		VMFLAGS='$(VMFLAGS) -env NFTRACE_TRUTH=1/7 -env NFTRACE_NFT=1/17 -env NFTRACE_EB=1/4'

#: make test-all            unit tests, then all end-to-end tests (CI)
test-all: test-unit test-live test-e2e test-e2e-lockdown

test-unit:
	$(GO) test ./...

#: make test-live           pkg/symbolize against the kernel and the programs in a VM with each kernel
test-live: $(KERNELS:%=test-live-%)

test-live-%: build/vm $$(addprefix $$(call bin,$$*),vm symbolize.test)
	build/vm -kernel $* -env NFTRACE_LIVE=1 $(VMFLAGS) -put $(call bin,$*)symbolize.test:/live/symbolize.test \
		-put pkg/symbolize/testdata:/live/testdata -dir /live -- /live/symbolize.test -test.v -test.run 'Live$$'

#: make test-e2e            all end-to-end tests; KERNELS='6.1', RUN='TestCases/s1', SKIP=TestChurn, VMFLAGS='-smp 2'
# With one CPU the counters of legacy tables are in the rules, with more per CPU: the
# first kernel has one, the second two, and some of the rulesets.
RUN ?= .
KERNELFLAGS.6.1 ?= -smp 2 -env NFTRACE_TRUTH=2/2 -env NFTRACE_NFT=2/3
# A VM takes one processor, whatever it has itself: VMS of them run at a time, and the kernel's name
# stands before their lines. make -k test-e2e goes on with the next kernel when one has failed.
VMS ?= 2
test-e2e:
	$(MAKE) --no-print-directory -j$(VMS) NAMED=yes $(KERNELS:%=test-e2e-%)

test-e2e-%: SHELL = /bin/bash
test-e2e-%: .SHELLFLAGS = -o pipefail -c
test-e2e-%: build/vm $$(addprefix $$(call bin,$$*),vm e2e.test traffic nftrace)
	build/vm -kernel $* -timeout 45m $(KERNELFLAGS.$*) $(if $(NFTRACE_SEEDS),-env NFTRACE_SEEDS=$(NFTRACE_SEEDS)) $(VMFLAGS) \
		-put $(call bin,$*)e2e.test:/e2e/e2e.test -put testenv/e2e/testdata:/e2e/testdata \
		-put $(call bin,$*)traffic:/usr/local/bin/traffic -put $(call bin,$*)nftrace:/usr/local/bin/nftrace \
		-dir /e2e -- /e2e/e2e.test -test.v -test.failfast=false -test.run '$(RUN)' $(if $(or $(SKIP.$*),$(SKIP)),-test.skip '$(or $(SKIP.$*),$(SKIP))') \
		$(if $(NAMED),2>&1 | sed -u 's/^/$*| /')

#: make test-churn          tables that are rewritten 50 times a second, for a minute by a clock that counts instructions; CHURN=613
CHURN ?= 3001
test-churn:
	$(MAKE) test-e2e-6.12 RUN='^TestChurn$$$$' VMFLAGS='-icount -env NFTRACE_CHURN=$(CHURN)'

#: make test-interleave     rules of packets that meet in one table, with full preemption, on one CPU and on two, and on 7.x as it is
test-interleave: test-interleave-1 test-interleave-2 test-interleave-7.x

# Tasks preempt each other there by default, and programs have a stack for each CPU.
test-interleave-7.x:
	$(MAKE) test-e2e-7.x RUN='^TestInterleaved' VMFLAGS='-smp 2 -env NFTRACE_INTERLEAVE=1'

test-interleave-%:
	$(MAKE) test-e2e-6.12 RUN='^TestInterleaved' VMFLAGS='-smp $* -append preempt=full -env NFTRACE_INTERLEAVE=1'

#: make test-matrix         a smaller run on each kernel of MATRIX, with one CPU and two in turn, and by kprobes on one, where modules lack type information on one
MATRIX ?= 5.10 6.1 6.12 6.18 7.x
test-matrix: $(MATRIX:%=test-matrix-%) test-e2e-no-btf
	$(MAKE) test-e2e-6.12 RUN='^(TestCases|TestTruth|TestTruthNFT)$$$$' \
		VMFLAGS='-env NFTRACE_BACKEND=kprobe -env NFTRACE_TRUTH=1/9 -env NFTRACE_NFT=1/9 $(VMFLAGS)'

MATRIXFLAGS.6.12 ?= -smp 2
MATRIXFLAGS.7.x ?= -smp 2
test-matrix-%:
	$(MAKE) test-e2e-$* KERNELFLAGS.$*= RUN='^(TestCases|TestBadInput|TestBackend|TestOracle.*|TestTruth|TestTruthNFT|TestTruthEB)$$$$' \
		VMFLAGS='$(MATRIXFLAGS.$*) -env NFTRACE_TRUTH=1/3 -env NFTRACE_NFT=1/5 -env NFTRACE_EB=1/2 $(VMFLAGS)'

#: make test-truth          all rulesets of all engines on each kernel of MATRIX, more than 100 of each engine
test-truth: $(MATRIX:%=test-truth-%)

test-truth-%:
	$(MAKE) test-e2e-$* KERNELFLAGS.$*= RUN='^TestTruth$$$$' NFTRACE_SEEDS=1-37 VMFLAGS='$(MATRIXFLAGS.$*) $(VMFLAGS)'
	$(MAKE) test-e2e-$* KERNELFLAGS.$*= RUN='^TestTruthNFT$$$$' NFTRACE_SEEDS=1-37 VMFLAGS='$(MATRIXFLAGS.$*) -timeout 90m $(VMFLAGS)'
	$(MAKE) test-e2e-$* KERNELFLAGS.$*= RUN='^TestTruthEB$$$$' NFTRACE_SEEDS=1-97 VMFLAGS='$(MATRIXFLAGS.$*) $(VMFLAGS)'
	$(MAKE) test-e2e-$* KERNELFLAGS.$*= RUN='^TestTruthARP$$$$' NFTRACE_SEEDS=1-97 VMFLAGS='$(MATRIXFLAGS.$*) $(VMFLAGS)'

#: make test-arm64          scenarios and a few rulesets on emulated arm64, with one CPU and with two
test-arm64: test-arm64-1 test-arm64-2

# A bare name after the slash is a ruleset of TestTruthNFT.
test-arm64-%: setup-arm64
	$(MAKE) test-e2e-6.12-arm64 RUN='^(TestCases|TestTruth|TestTruthNFT)$$$$/^(s1|s7|shared|[a-r])' \
		VMFLAGS='-smp $* -env NFTRACE_TRUTH=1/29 -env NFTRACE_NFT=1/41 $(VMFLAGS)'

#: make kernel-builtin      build the kernel 6.12-builtin, whose netfilter is no modules: many minutes, once for each release of Debian's
kernel-builtin: setup-builtin build/vm
	build/vm -kernel 6.12-builtin -- uname -a

# Debian's kernels have a hook in every namespace; here a namespace without rules has none, and three
# scenarios ask for packets of such a one.
BUILTIN_SKIP = ^TestCases$$$$/^s9-(flowtable|nft-accept)
#: make test-builtin        scenarios and some of the rulesets on that kernel, by fentry and by kprobes
# It has no table security, which TestTruth's rulesets want to empty.
test-builtin: kernel-builtin
	$(MAKE) test-e2e-6.12-builtin SKIP='$(BUILTIN_SKIP)' RUN='^(TestBuiltIn|TestCases|TestBadInput|TestBackend|TestRefusedFentry|TestOracle.*|TestTruthNFT|TestTruthEB)$$$$' \
		VMFLAGS='-env NFTRACE_TRUTH=1/3 -env NFTRACE_NFT=1/5 -env NFTRACE_EB=1/2 $(VMFLAGS)'
	$(MAKE) test-e2e-6.12-builtin SKIP='$(BUILTIN_SKIP)' RUN='^(TestBuiltIn|TestCases|TestTruthNFT)$$$$' \
		VMFLAGS='-smp 2 -env NFTRACE_BACKEND=kprobe -env NFTRACE_TRUTH=1/9 -env NFTRACE_NFT=1/9 $(VMFLAGS)'

#: make test-e2e-lockdown   what nftrace says where the kernel forbids tracing, in boots of their own
test-e2e-lockdown: $(KERNELS:%=test-e2e-lockdown-%)

test-e2e-lockdown-%:
	$(MAKE) test-e2e-$* RUN='^TestLockdown$$$$' VMFLAGS='$(VMFLAGS) -append lockdown=confidentiality'

#: make test-e2e-no-btf    with modules that have no type information, in boots of their own
NO_BTF = x_tables,bridge,nf_nat,nf_defrag_ipv6,nf_flow_table
test-e2e-no-btf:
	$(MAKE) test-e2e-6.12 RUN='^(TestIPTablesComesLater|TestCases|TestModulesWithoutBTF)$$$$/^(s1-container|s4-ebtables-tree|s7)' \
		VMFLAGS='-env NFTRACE_NO_BTF=$(NO_BTF) -smp 2 -append preempt=full $(VMFLAGS)'
	$(MAKE) test-e2e-6.12 RUN='^TestModulesWithoutBTF$$$$' VMFLAGS='-env NFTRACE_NO_BTF=all $(VMFLAGS)'

#: make bench               what nftrace costs a packet, in instructions; KERNEL=6.1, BENCHFLAGS=-profile
# First with per-CPU counters as on real hosts, then with those of one possible CPU.
# Last, not counting, the time until nftrace is attached.
BENCH = build/vm -kernel $(KERNEL) -put build/bench:/usr/local/bin/bench -put build/nftrace:/usr/local/bin/nftrace
bench: build/vm build/bench build/nftrace
	@status=0; \
	$(BENCH) -icount -smp 2 -append maxcpus=1 -- bench $(BENCHFLAGS) || status=1; \
	$(BENCH) -icount -- bench $(BENCHFLAGS) || status=1; \
	$(BENCH) -- bench -attach || status=1; \
	exit $$status

#: make pgo                 measure anew what the compiler is to make fast (cmd/nftrace/default.pgo): packets, and starting
pgo: build/vm
	dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && \
	$(GO) test -trimpath -c -o "$$dir/packet" ./cmd/nftrace && $(GO) test -trimpath -c -o "$$dir/open" ./pkg/trace && \
	(cd "$$dir" && ./packet -test.run '^$$' -test.bench Packet -test.benchtime 10s -test.cpuprofile packet.prof) && \
	build/vm -kernel $(KERNEL) -put "$$dir/open:/pgo/open" -dir /pgo -get "/pgo/open.prof:$$dir/open.prof" -- \
		./open -test.run '^$$' -test.bench Open -test.benchtime 17x -test.cpuprofile open.prof && \
	$(GO) tool pprof -proto -symbolize=none -output cmd/nftrace/default.pgo "$$dir"/*.prof

build/bench: FORCE
	$(GO) build -o $@ ./testenv/bench

#: make fuzz                each fuzz target in turn; FUZZTIME=10s
FUZZTIME ?= 10s
fuzz:
	@for t in $$(grep -rEo --include='*_test.go' '^func Fuzz[A-Za-z0-9_]+' . | sed 's,/[^/]*:func ,:,'); do \
		echo "$$t"; \
		$(GO) test -run '^$$' -fuzz "^$${t#*:}\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x "$${t%:*}" || exit 1; \
	done

#: make cross               build and vet for arm64
cross:
	GOARCH=arm64 $(GO) build ./...
	GOARCH=arm64 $(GO) vet ./...

#: make clean               remove build/; kernels stay in $NFTRACE_CACHE or ~/.cache/nftrace
clean:
	rm -rf build

build/e2e.test build/arm64/e2e.test: FORCE
	$(GO) test -c -o $@ ./testenv/e2e

build/symbolize.test build/arm64/symbolize.test: FORCE
	$(GO) test -c -o $@ ./pkg/symbolize

build/traffic build/arm64/traffic: FORCE
	$(GO) build -o $@ ./testenv/cmd/traffic

build/nftrace build/arm64/nftrace: FORCE
	$(GO) build -o $@ ./cmd/nftrace

# go build knows best whether something has changed.
build/vm build/arm64/vm: FORCE
	$(GO) build -o $@ ./testenv/cmd/vm

FORCE:
