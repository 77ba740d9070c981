// Package testenv boots a Linux kernel in QEMU, runs one command in it as root
// and brings back its output, its exit status and the files it leaves.
//
// It exists because nftrace has to be tried on many kernels, against the
// kernel's own packet trace, and with no rule of the machine it is built on
// touched. Three things make a VM:
//
//   - a kernel: Debian's, picked by package pattern from the archive that the
//     machine's own apt knows, unpacked into a cache and never installed
//     (kernel.go holds the one table of kernels), or built of Debian's source
//     where no package is configured so (build.go);
//   - an initramfs: busybox, the network tools with their shared libraries and
//     the kernel's network modules, cached by content (initramfs.go); for a
//     kernel of another architecture the tools come from packages of that
//     (root.go);
//   - an init: the binary that starts the VM, or the same built for another
//     architecture, is also the guest's /init (guest.go), so the two ends of the
//     wire (wire.go) are built together.
//
// The command for it is testenv/cmd/vm. Nothing is left behind: the guest's
// file system is in memory and the files QEMU needs have no name.
//
// testenv imports nothing of nftrace, and only tests and make use it.
package testenv
