// Package bpf holds the probes (C, GPL-2.0) and, beside them, the Go that bpf2go
// makes of them: the compiled objects and the types of the records.
//
// It may import only cilium/ebpf. What the probes do is said in nftrace.bpf.c
// and its headers.
package bpf
