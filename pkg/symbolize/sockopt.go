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
	soGetEntries = 65 // IPT_SO_GET_ENTRIES, IP6T_SO_GET_ENTRIES

	infoSize      = 84 // struct ipt_getinfo
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
	file := procNet + "/ip_tables_names"
	if family == IPv6 {
		file = procNet + "/ip6_tables_names"
	}
	b, err := os.ReadFile(file)
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

	af, level := unix.AF_INET, unix.SOL_IP
	if family == IPv6 {
		af, level = unix.AF_INET6, unix.SOL_IPV6
	}
	fd, err := unix.Socket(af, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return fail(fmt.Errorf("raw socket: %w", err))
	}
	defer unix.Close(fd)

	// The table may change between the two calls; EAGAIN says so.
	for range 100 {
		buf := make([]byte, infoSize)
		copy(buf, name)
		if err := getsockopt(fd, level, soGetInfo, buf); err != nil {
			if errors.Is(err, unix.ENOENT) {
				err = ErrNoTable
			}
			return fail(err)
		}
		info := parseInfo(buf)
		if info.Size > maxTable {
			return fail(fmt.Errorf("%d bytes long", info.Size))
		}
		buf = make([]byte, entriesHeader+int(info.Size))
		copy(buf, name)
		binary.NativeEndian.PutUint32(buf[tableNameSize:], info.Size)
		err := getsockopt(fd, level, soGetEntries, buf)
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

// parseInfo reads a struct ipt_getinfo, which has infoSize bytes.
func parseInfo(b []byte) Info {
	u := func(i int) uint32 { return binary.NativeEndian.Uint32(b[tableNameSize+4*i:]) }
	info := Info{ValidHooks: u(0), NumEntries: u(11), Size: u(12)}
	for h := range NumHooks {
		info.HookEntry[h], info.Underflow[h] = u(1+h), u(6+h)
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
