// Package nftrace is the root of the module; it holds what generates code.
//
// The generated files are committed, so that building needs only Go. Changing
// anything in bpf/ needs clang-19 and libbpf-dev (make setup installs them),
// then: make generate.
package nftrace

//go:generate go tool bpf2go -go-package bpf -output-dir bpf -output-stem nftrace -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -type rec_hdr -type rec_hook -type rec_dev -type rec_nat -type rec_pkt -type rec_nft -type rec_flow -type rec_ebt -type new_table -type pkt -type hit -type hook_table -type dev -type place -type iface -type addr -type pkt_tuple -type xt_table_head Nftrace bpf/nftrace.bpf.c -- -Ibpf -idirafter /usr/include/x86_64-linux-gnu -Wall -Werror
//go:generate go tool bpf2go -go-package bpf -output-dir bpf -output-stem nftrace_kprobe -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types NftraceKprobe bpf/nftrace_kprobe.bpf.c -- -Ibpf -idirafter /usr/include/x86_64-linux-gnu -Wall -Werror
//go:generate sh -c "go run ./bpf/nolines bpf/*.o"
