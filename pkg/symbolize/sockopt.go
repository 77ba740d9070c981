package symbolize

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	soGetInfo    = 64 // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	soGetInfoARP = 96 // ARPT_SO_GET_INFO; behind each comes its …_SO_GET_ENTRIES

	entriesHeader = 40 // struct ipt_get_entries up to entrytable
	tableNameSize = 32 // XT_TABLE_MAXNAMELEN

	// maxTable bounds what is read: the kernel's own limit
	// (net/netfilter/x_tables.c:XT_MAX_TABLE_SIZE).
	maxTable = 512 << 20
)

// ErrNoTable is returned where the namespace has no table of this name. Asking
// the kernel for one would create it, so nobody does.
var ErrNoTable = errors.New("no such table in this network namespace")

// TableNames returns the tables that the calling thread's network namespace
// has. It asks nothing that could create one or load a module. It is empty
// where the kernel has no xtables.
func TableNames(family Family) ([]string, error) {
	return tableNames("/proc/thread-self/net", family)
}

func tableNames(procNet string, family Family) ([]string, error) {
	b, err := os.ReadFile(procNet + "/" + family.String() + "_tables_names")
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // the module is not loaded
	}
	if err != nil {
		return nil, fmt.Errorf("names of %v tables: %w", family, err)
	}
	return strings.Fields(string(b)), nil
}

// ReadTable reads a table of the calling thread's network namespace; callers
// keep the goroutine on its thread (Namespace.Do does). It needs
// CAP_NET_ADMIN. It wraps ErrNoTable where the namespace has no such table.
func ReadTable(family Family, name string) (*Table, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	info, blob, err := readBlob(family, name)
	if err != nil {
		return nil, err
	}
	return ParseTable(family, name, info, blob)
}

func readBlob(family Family, name string) (Info, []byte, error) {
	fail := func(err error) (Info, []byte, error) {
		return Info{}, nil, fmt.Errorf("%v table %q: %w", family, name, err)
	}
	names, err := TableNames(family)
	if err != nil {
		return fail(err)
	}
	listed := false
	for _, n := range names {
		listed = listed || n == name
	}
	if !listed || len(name) >= tableNameSize {
		return fail(ErrNoTable)
	}

	af, level, opt := unix.AF_INET, unix.SOL_IP, soGetInfo
	switch family {
	case ARP:
		opt = soGetInfoARP
	case IPv6:
		af, level = unix.AF_INET6, unix.SOL_IPV6
	}
	fd, err := unix.Socket(af, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return fail(fmt.Errorf("raw socket: %w", err))
	}
	defer unix.Close(fd)

	// The table may change between the two calls; EAGAIN says so.
	for range 100 {
		buf := make([]byte, infoSize(family))
		copy(buf, name)
		if err := getsockopt(fd, level, opt, buf); err != nil {
			if errors.Is(err, unix.ENOENT) {
				err = ErrNoTable
			}
			return fail(err)
		}
		info := parseInfo(family, buf)
		if info.Size > maxTable {
			return fail(fmt.Errorf("%d bytes long", info.Size))
		}
		buf = make([]byte, entriesHeader+int(info.Size))
		copy(buf, name)
		binary.NativeEndian.PutUint32(buf[tableNameSize:], info.Size)
		err := getsockopt(fd, level, opt+1, buf)
		if errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			return fail(err)
		}
		return info, buf[entriesHeader:], nil
	}
	return fail(errors.New("it changed whenever it was read"))
}

// infoSize is the size of struct ipt_getinfo (ip6t_getinfo, arpt_getinfo).
func infoSize(family Family) int { return tableNameSize + 4*(3+2*len(family.hookNames())) }

// parseInfo reads such a struct, which has infoSize bytes.
func parseInfo(family Family, b []byte) Info {
	u := func(i int) uint32 { return binary.NativeEndian.Uint32(b[tableNameSize+4*i:]) }
	n := len(family.hookNames())
	info := Info{ValidHooks: u(0), NumEntries: u(1 + 2*n), Size: u(2 + 2*n)}
	for h := range n {
		info.HookEntry[h], info.Underflow[h] = u(1+h), u(1+n+h)
	}
	return info
}

// getsockopt fills buf, which starts with what the kernel wants to know.
func getsockopt(fd, level, opt int, buf []byte) error {
	size := uint32(len(buf))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(opt),
		uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	if int(size) != len(buf) {
		return fmt.Errorf("the kernel gave %d of %d bytes", size, len(buf))
	}
	return nil
}

const (
	soGetEBTInfo    = 128 // EBT_SO_GET_INFO
	soGetEBTEntries = 129 // EBT_SO_GET_ENTRIES

	// struct ebt_replace, of 64-bit machines
	ebtReplaceSize = 120
	ebtReplaceInfo = 32 // valid_hooks, nentries, entries_size
	ebtReplaceAt   = 112
)

// ReadEBT reads a table of ebtables in a namespace. The table must be known to be there: the
// kernel would make one, or load its module, for whoever asks. Where the kernel does not
// have its module it wraps ErrNoTable.
func ReadEBT(ns *Namespace, name string) (*EBTTable, error) {
	if !ns.sys.hasModule("ebtable_" + name) {
		return nil, fmt.Errorf("ebtables table %q: %w", name, ErrNoTable)
	}
	var t *EBTTable
	err := ns.Do(func() error {
		var err error
		t, err = readEBT(name)
		return err
	})
	return t, err
}

func readEBT(name string) (*EBTTable, error) {
	fail := func(err error) (*EBTTable, error) { return nil, fmt.Errorf("ebtables table %q: %w", name, err) }
	if len(name) >= ebtNameSize || strings.ContainsAny(name, "/.") {
		return fail(ErrNoTable)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return fail(fmt.Errorf("raw socket: %w", err))
	}
	defer unix.Close(fd)
	// The table may change between the two calls; EINVAL says so.
	for range 100 {
		ask := make([]byte, ebtReplaceSize)
		copy(ask, name)
		if err := getsockopt(fd, unix.SOL_IP, soGetEBTInfo, ask); err != nil {
			return fail(err)
		}
		u := func(i int) uint32 { return binary.NativeEndian.Uint32(ask[ebtReplaceInfo+4*i:]) }
		info := ebtInfo{u(0), u(1), u(2)}
		if info.size == 0 || info.size > maxTable {
			return fail(fmt.Errorf("%d bytes long", info.size))
		}
		blob := make([]byte, info.size)
		var pin runtime.Pinner
		pin.Pin(&blob[0])
		binary.NativeEndian.PutUint64(ask[ebtReplaceAt:], uint64(uintptr(unsafe.Pointer(&blob[0]))))
		// The kernel wants the sizes of both, and writes to the second only.
		size := uint32(ebtReplaceSize) + info.size
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_IP, soGetEBTEntries,
			uintptr(unsafe.Pointer(&ask[0])), uintptr(unsafe.Pointer(&size)), 0)
		pin.Unpin()
		switch errno {
		case 0:
			return parseEBT(name, info, blob)
		case unix.EINVAL:
			continue
		}
		return fail(errno)
	}
	return fail(errors.New("it changed whenever it was read"))
}
